"""Likelihood: bits per dimension of a data set, term by term, and estimators of the bound with their variance."""

from .bits_per_dim import BitsPerDim, bits_per_dim, histogram_bits_per_dim
from .bound import BoundTerms, vlb_term, vlb_terms
from .estimators import (
    Estimate,
    EstimatorVariance,
    estimator_variances,
    importance_probabilities,
    pair_estimate,
    posterior_entropy,
    single_estimate,
    trajectory_estimate,
    variance_table,
)
from .plot import plot_bits_per_dim

__all__ = [
    "BitsPerDim",
    "BoundTerms",
    "Estimate",
    "EstimatorVariance",
    "bits_per_dim",
    "estimator_variances",
    "histogram_bits_per_dim",
    "importance_probabilities",
    "pair_estimate",
    "plot_bits_per_dim",
    "posterior_entropy",
    "single_estimate",
    "trajectory_estimate",
    "variance_table",
    "vlb_term",
    "vlb_terms",
]
