"""Names of recipes, priors and guides for shell completion, which must not wait for the import of their classes."""

__all__ = ["GUIDE_NAMES", "PRIOR_NAMES", "RECIPE_NAMES"]

RECIPE_NAMES = (
    "abmll",
    "abmll-network",
    "abmll-network-gradient",
    "abmll-released",
    "abmll-weight",
    "blob",
    "ensemble",
    "fomaml",
    "laplace-lora",
    "lora",
    "map-temperature",
    "mc-dropout",
    "multitask-lora",
    "reptile",
    "subspace",
    "subspace-network",
    "tangent",
)
PRIOR_NAMES = (
    "activation-space",
    "cluster-mixture",
    "hierarchical-normal",
    "independent-normal",
    "layerwise-scale",
    "rank-ard",
    "regularized-horseshoe",
    "subspace",
    "weight-space",
)
GUIDE_NAMES = (
    "ensemble",
    "flow-network",
    "gradient-guide",
    "guide-network",
    "laplace",
    "mc-dropout",
    "mean-field",
    "nuts",
    "sgld",
    "shared-mean-field",
    "shared-point",
    "swag",
    "tangent-guide",
    "tangent-network",
)
