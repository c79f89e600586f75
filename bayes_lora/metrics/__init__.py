"""Metrics of predictions, computed from arrays, and plots.

The names below are imported when they are first used, because torchmetrics, scipy and matplotlib are slow to import.
The function :func:`bayes_lora.metrics.uncertainty.uncertainty` is not among them: its module has the same name.
"""

from typing import TYPE_CHECKING

from bayes_lora.utils.lazy import lazy_names

if TYPE_CHECKING:
    from bayes_lora.metrics.options import (
        Metrics,
        adaptive_calibration_error,
        compute_metrics,
        expected_calibration_error,
        mean_metrics,
        per_example_gap,
        top_confidence,
    )
    from bayes_lora.metrics.plots import entropy_plot, reliability_diagram, risk_coverage_plot, support_curve_plot
    from bayes_lora.metrics.posterior_plots import (
        beta_sweep_plot,
        layer_heat_map,
        learning_curve_plot,
        shrinkage_plot,
        task_map,
    )
    from bayes_lora.metrics.ranking import OODMetrics, ood_metrics, risk_coverage
    from bayes_lora.metrics.selective import RiskControl, risk_control_threshold
    from bayes_lora.metrics.semantic import group_texts, same_text, semantic_entropy
    from bayes_lora.metrics.tables import metric_table
    from bayes_lora.metrics.text import TextMetrics, text_metrics
    from bayes_lora.metrics.uncertainty import credible_interval

__all__ = [
    "Metrics",
    "OODMetrics",
    "RiskControl",
    "TextMetrics",
    "adaptive_calibration_error",
    "beta_sweep_plot",
    "compute_metrics",
    "credible_interval",
    "entropy_plot",
    "expected_calibration_error",
    "group_texts",
    "layer_heat_map",
    "learning_curve_plot",
    "mean_metrics",
    "metric_table",
    "ood_metrics",
    "per_example_gap",
    "reliability_diagram",
    "risk_control_threshold",
    "risk_coverage",
    "risk_coverage_plot",
    "same_text",
    "semantic_entropy",
    "shrinkage_plot",
    "support_curve_plot",
    "task_map",
    "text_metrics",
    "top_confidence",
]

_MODULES = {
    "Metrics": "options",
    "OODMetrics": "ranking",
    "RiskControl": "selective",
    "TextMetrics": "text",
    "adaptive_calibration_error": "options",
    "beta_sweep_plot": "posterior_plots",
    "compute_metrics": "options",
    "credible_interval": "uncertainty",
    "entropy_plot": "plots",
    "expected_calibration_error": "options",
    "group_texts": "semantic",
    "layer_heat_map": "posterior_plots",
    "learning_curve_plot": "posterior_plots",
    "mean_metrics": "options",
    "metric_table": "tables",
    "ood_metrics": "ranking",
    "per_example_gap": "options",
    "reliability_diagram": "plots",
    "risk_control_threshold": "selective",
    "risk_coverage": "ranking",
    "risk_coverage_plot": "plots",
    "same_text": "semantic",
    "semantic_entropy": "semantic",
    "shrinkage_plot": "posterior_plots",
    "support_curve_plot": "plots",
    "task_map": "posterior_plots",
    "text_metrics": "text",
    "top_confidence": "options",
}
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
