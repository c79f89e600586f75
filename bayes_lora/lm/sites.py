"""LoRA sites: the adapter matrices of a PEFT model that can be random, and binding of sampled values to them.

PEFT injects its layers (``lora_B(lora_A(x)) * scaling``); :func:`find_sites` then replaces each layer's ``lora_A`` and
``lora_B`` linears by a :class:`Slot`, whose ``weight`` is bound from outside. One *site* is the stack over layers of
one factor of one module kind: ``q_proj.lora_A`` has event shape ``(layers, r, d_in)``. No ``forward`` is patched.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from bayes_lora.errors import SiteError, did_you_mean
from bayes_lora.lm.adapters import TAKEN, check_not_taken, lora_layers
from bayes_lora.lm.option_head import HEAD_SHAPES
from bayes_lora.lm.slots import Bindings, Bound, Slot, Values, unchanged
from bayes_lora.lm.subspace import subspace_shapes
from bayes_lora.types import Sites, SiteShapes, delta_site, factor_sites
from bayes_lora.utils.grouped_linear import RowGroups
from bayes_lora.utils.seeding import same_noise

__all__ = ["LoraSites", "Slot", "delta_site", "factor_sites", "find_sites", "remove_dropout"]

FACTORS = ("lora_A", "lora_B")


class LoraSites:
    """The LoRA sites of one PEFT model.

    Attributes:
        shapes: from site name to event shape ``(layers, out, in)``.
        delta_shapes: event shapes of whole updates, which may be bound in place of their two factors:
            ``q_proj.delta_weight`` for ``q_proj.lora_A`` and ``q_proj.lora_B``.
        modules: from site name to the Hugging Face names of the adapted modules, in layer order.
    """

    def __init__(self, slots: Mapping[str, Sequence[tuple[str, Slot]]]) -> None:
        self._slots = {site: [slot for _, slot in pairs] for site, pairs in slots.items()}
        self._bindings = Bindings()
        for site, own in self._slots.items():
            for layer, slot in enumerate(own):
                slot.attach(self._bindings, site, layer)
        self.modules = {site: [name for name, _ in pairs] for site, pairs in slots.items()}
        self.shapes: SiteShapes = {
            site: (len(slots), slots[0].initial.shape[0], slots[0].initial.shape[1])
            for site, slots in self._slots.items()
        }
        self.delta_shapes: SiteShapes = {
            delta_site(a): (self.shapes[a][0], self.shapes[factor_sites(delta_site(a))[1]][1], self.shapes[a][2])
            for a in self.shapes
            if ".lora_A" in a
        }

    def __repr__(self) -> str:
        inside = ", ".join(f"{site}: {shape}" for site, shape in self.shapes.items())
        return f"LoraSites({inside})"

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def num_parameters(self) -> int:
        """Number of LoRA weights of one draw."""
        return sum(layers * rows * columns for layers, rows, columns in self.shapes.values())

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """Yield the name of each adapted module with the slot of each of its factors."""
        for site, slots in self._slots.items():
            yield from zip(self.modules[site], slots, strict=True)

    def initial(self) -> Sites:
        """Return the values of the LoRA linears before they became slots, ``(layers, out, in)`` per site.

        These are PEFT's initial values (A random, B zero), or the weights of a trained adapter (see
        :func:`bayes_lora.lm.loading.from_peft`).
        """
        return {site: torch.stack([slot.initial for slot in slots]) for site, slots in self._slots.items()}

    def check(self, values: Sites) -> None:
        """Raise :class:`SiteError` unless ``values`` has exactly these sites with these event shapes.

        A ``delta_weight`` replaces both of its factors. The sites of the option head are optional, and so are a code
        and directions, see :mod:`bayes_lora.lm.subspace`.
        """
        head = {site: shape for site, shape in HEAD_SHAPES.items() if site in values}
        self._check(values, head | subspace_shapes(values, self.shapes))

    def _check(self, values: Sites, more: SiteShapes) -> None:
        """Check values of the LoRA sites and of some more."""
        whole = {site: shape for site, shape in self.delta_shapes.items() if site in values}
        replaced = {factor for site in whole for factor in factor_sites(site)}
        expected = {site: shape for site, shape in self.shapes.items() if site not in replaced} | whole | more
        for site in values.keys() - expected.keys():
            near = did_you_mean(site, expected, list_all=True)
            raise SiteError(f"site {site!r}: the model has no such site{near}.")
        for site, shape in expected.items():
            if site not in values:
                raise SiteError(f"site {site!r}: no value given. Expected one of event shape {shape}.")
            got = tuple(values[site].shape[-3:])
            if got != shape:
                hint = " Is it transposed?" if got == (shape[0], shape[2], shape[1]) else ""
                raise SiteError(f"site {site!r}: expected event shape {shape} (layers, out, in), got {got}.{hint}")

    @contextmanager
    def bind(self, values: Sites, rows: Sequence[int] | None = None) -> Iterator[None]:
        """Bind values to the slots inside the block, and restore the previous values on exit.

        Args:
            values: per site ``(layers, out, in)``, or ``(groups, layers, out, in)`` for a batch whose rows are
                grouped by draw: a tensor, or an object with a ``shape`` whose ``layers()`` returns one function of
                activations per layer.
            rows: number of rows of each group; None if they are equal.

        Raises:
            SiteError: a site is missing or unknown, or has the wrong event shape or number of groups.
        """
        self._check(values, {})
        groups = {value.shape[:-3] for value in values.values()}
        if len(groups) > 1 or any(len(group) > 1 for group in groups):
            got = {site: tuple(value.shape) for site, value in values.items()}
            raise SiteError(f"expected (layers, out, in) or (groups, layers, out, in) for all sites, got {got}.")
        if rows is not None and groups != {(len(rows),)}:
            raise SiteError(f"got values for {[*next(iter(groups), ())]} groups, but rows for {len(rows)}.")
        row_groups = None
        if rows is not None:
            row_groups = RowGroups.of(rows, next(iter(self._slots.values()))[0].initial.device)
        with _Binding(self._bindings, Values(self._by_site(values), row_groups)):
            yield

    def _by_site(self, values: Sites) -> dict[str, Sequence[Bound]]:
        bound: dict[str, Sequence[Bound]] = {}
        for site, value in values.items():
            layers: Sequence[Bound] = value.unbind(-3) if isinstance(value, Tensor) else value.layers()
            if site in self.delta_shapes:
                a, b = factor_sites(site)
                bound |= {a: [unchanged] * len(layers), b: layers}
            else:
                bound[site] = layers
        return bound

    def unbound(self) -> AbstractContextManager[None]:
        """Unbind all values inside the block, so that the model runs without its adapter."""
        return _Binding(self._bindings, Values({}))

    def checkpoint_context(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The ``context_fn`` of ``torch.utils.checkpoint``: backward recomputes with the values bound in forward.

        Gradient checkpointing runs the forward again inside ``backward``, after :meth:`bind` has exited.
        """
        values = self._bindings.values
        draws = any(not isinstance(layers[0], Tensor) for layers in values.by_site.values())
        device = next(iter(self._slots.values()))[0].initial.device
        return nullcontext(), _Binding(self._bindings, values, same_noise(device) if draws else nullcontext)

    def unstack(self, values: Sites) -> dict[str, Tensor]:
        """Split sites into Hugging Face names: ``{"model.layers.0.self_attn.q_proj.lora_A": (..., out, in)}``.

        The option head has no module, and is left out.
        """
        self.check(values)
        return {
            f"{module}.{_factor(site)}": weight
            for site, modules in self.modules.items()
            for module, weight in zip(modules, values[site].unbind(-3), strict=True)
        }

    def stack(self, weights: Mapping[str, Tensor]) -> Sites:
        """Inverse of :meth:`unstack`.

        Raises:
            SiteError: a weight is missing or left over.
        """
        names = {site: [f"{module}.{_factor(site)}" for module in modules] for site, modules in self.modules.items()}
        expected = {name for group in names.values() for name in group}
        if expected != weights.keys():
            missing, extra = sorted(expected - weights.keys()), sorted(weights.keys() - expected)
            raise SiteError(f"LoRA weights do not match the sites: missing {missing[:4]}, unexpected {extra[:4]}.")
        return {site: torch.stack([weights[name] for name in group], dim=-3) for site, group in names.items()}


Noise = Callable[[], AbstractContextManager[Any]]


class _Binding(AbstractContextManager[None]):
    """Binds weights, and restores the previous ones on exit. Reentrant: every backward through a checkpoint enters it.

    ``noise`` makes a context manager that is entered too, such as one that repeats the random draws of the forward.
    """

    def __init__(self, bindings: Bindings, values: Values, noise: Noise = nullcontext) -> None:
        self.bindings, self.values, self.noise = bindings, values, noise
        self.before: list[tuple[Values, ExitStack]] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        stack.enter_context(self.noise())
        self.before.append((self.bindings.values, stack))
        self.bindings.values = self.values

    def __exit__(self, *_: object) -> None:
        self.bindings.values, stack = self.before.pop()
        stack.close()


def _factor(site: str) -> str:
    return next(factor for factor in FACTORS if f".{factor}" in site)


def _layer_index(name: str) -> int:
    numbers = re.findall(r"\.(\d+)\.", f".{name}.")
    return int(numbers[0]) if numbers else 0


def find_sites(model: nn.Module, adapter: str = "default") -> LoraSites:
    """Replace the LoRA linears of a PEFT-injected model by slots, and return its sites.

    Layers of one module kind whose shapes differ become separate sites, ``q_proj.lora_A``, ``q_proj.lora_A.2``. Both
    factors of a layer have the same number.

    ``lora_dropout`` is removed, with one warning, because the scores are a deterministic function of phi.

    Args:
        model: the model; its inactive adapters do not change.
        adapter: PEFT's name of the adapter.

    Raises:
        SiteError: the model has no LoRA layer, the factors of a layer are not plain linears (embeddings,
            convolutions, DoRA, ``lora_bias=True``), other adapters of a layer are active, the adapter is merged or
            inactive, or the model already belongs to a language model.
    """
    found: dict[str, dict[tuple[int, ...], list[tuple[str, Slot, Slot]]]] = {}
    check_not_taken(model)
    layers, dtype = list(lora_layers(model, adapter)), getattr(model, "dtype", None)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            _check_layer(name, layer, adapter)
        elif isinstance(layer, BaseTunerLayer):
            raise SiteError(f"module {name!r}: expected LoRA alone, got an adapter of PEFT's {type(layer).__name__}.")
    for name, layer in sorted(layers, key=lambda pair: _layer_index(pair[0])):
        a, b = (_replace(getattr(layer, factor), adapter, dtype) for factor in FACTORS)
        shapes = (*a.initial.shape, *b.initial.shape)
        found.setdefault(name.rpartition(".")[2], {}).setdefault(shapes, []).append((name, a, b))
        TAKEN.add(layer)
    rate = remove_dropout(model, adapter)
    if rate:
        warnings.warn(
            f"lora_dropout={rate} is not applied: scores are a function of phi alone. Set lora_dropout=0.0.",
            stacklevel=2,
        )
    if not found:
        raise SiteError("the model has no LoRA layer. Inject some first: peft.inject_adapter_in_model(config, model).")
    return LoraSites(
        {
            f"{kind}.{factor}" + (f".{index}" if index > 1 else ""): [(name, slots[f]) for name, *slots in layers]
            for kind, by_shape in found.items()
            for f, factor in enumerate(FACTORS)
            for index, layers in enumerate(by_shape.values(), start=1)
        }
    )


def _check_layer(name: str, layer: LoraLayer, adapter: str) -> None:
    others = sorted((set(layer.active_adapters) & layer.r.keys()) - {adapter})
    if others:
        raise SiteError(f"module {name!r}: adapters {others} are active in addition to {adapter!r}. Deactivate them.")
    if layer.merged:
        raise SiteError(f"module {name!r}: {layer.merged_adapters} are merged. Call unmerge_adapter() first.")
    if adapter not in layer.r:
        return
    if adapter in layer.lora_A and isinstance(layer.lora_A[adapter], Slot):
        raise SiteError(f"module {name!r}: its LoRA already belongs to a LanguageModel. Load the model again.")
    if layer.disable_adapters or adapter not in layer.active_adapters:
        raise SiteError(f"module {name!r}: adapter {adapter!r} is not active. Call set_adapter({adapter!r}) first.")
    variant = layer.lora_variant.get(adapter)
    if variant is not None or adapter not in layer.lora_A or not isinstance(layer.lora_A[adapter], nn.Linear):
        kind = type(layer).__name__ if variant is None else type(variant).__name__
        raise SiteError(f"module {name!r}: only plain LoRA on linear modules can be random, got PEFT's {kind}.")
    if layer.lora_B[adapter].bias is not None:
        raise SiteError(f"module {name!r}: its LoRA has a bias, which is not a LoRA site. Set lora_bias=False.")


def _replace(factors: Any, adapter: str, dtype: torch.dtype | None) -> Slot:
    # At least float32, because bfloat16 would round small updates of the weights to zero.
    initial = factors[adapter].weight
    slot = Slot(initial.to(torch.promote_types(initial.dtype, torch.float32)), dtype)
    factors[adapter] = slot
    return slot


def remove_dropout(model: nn.Module, adapter: str) -> float:
    """Remove an adapter's dropout from a model, and return its highest rate; 0 if there is none."""
    rates = [0.0]
    for _, layer in lora_layers(model, adapter):
        dropout = layer.lora_dropout[adapter]
        if isinstance(dropout, nn.Dropout):
            rates.append(dropout.p)
        layer.lora_dropout[adapter] = nn.Identity()
    return max(rates)
