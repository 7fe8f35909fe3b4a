"""Pictures that explain a run. PNG files, readable in print, in grey and by the colour-blind."""

from hfkd.report.galleries import OTHER, QUERY, SAME, Sample, Samples, influence_gallery, neighbour_gallery
from hfkd.report.plots import accuracy_against_latency, confusion_difference, reliability_diagram, training_curves


__all__ = [
    "OTHER",
    "QUERY",
    "SAME",
    "Sample",
    "Samples",
    "accuracy_against_latency",
    "confusion_difference",
    "influence_gallery",
    "neighbour_gallery",
    "reliability_diagram",
    "training_curves",
]
