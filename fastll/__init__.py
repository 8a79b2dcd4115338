"""fastll (fast log-likelihood): log-sum-exp, softmax, cross-entropy and their gradients.

Where an argument is array_like, it may also be an array of torch, CuPy, Numba, JAX or any library with
DLPack or `__cuda_array_interface__`, on the CPU or on a CUDA device. Results are arrays of the library
of the first argument, on the same device, computed on the caller's current stream.
"""

import sys as _sys

from fastll import formulas, testing
from fastll.api.elementwise import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    gaussian_nll,
    mse,
    poisson_nll,
    sigmoid_focal_loss,
)
from fastll.api.formula import elementwise_loss
from fastll.api.logits import (
    entropy_from_logits,
    kl_divergence_from_logits,
    selective_log_softmax,
)
from fastll.api.losses import cross_entropy, dense_cross_entropy, nll_loss, sparse_cross_entropy
from fastll.api.reductions import (
    distribution_cross_entropy,
    entropy,
    kl_divergence,
    log_sigmoid,
    log_softmax,
    logsumexp,
    sigmoid,
    softmax,
)
from fastll.api.sequences import perplexity, sequence_log_likelihood
from fastll.api.streaming import LogSumExp, NegativeLogLikelihood
from fastll.api.warmup import warmup
from fastll.dispatch import backends, debug_labels, use_backend
from fastll.threads import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "LogSumExp",
    "NegativeLogLikelihood",
    "backends",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "debug_labels",
    "dense_cross_entropy",
    "distribution_cross_entropy",
    "elementwise_loss",
    "entropy",
    "entropy_from_logits",
    "formulas",
    "gaussian_nll",
    "get_num_threads",
    "kl_divergence",
    "kl_divergence_from_logits",
    "log_sigmoid",
    "log_softmax",
    "logsumexp",
    "mse",
    "nll_loss",
    "perplexity",
    "poisson_nll",
    "selective_log_softmax",
    "sequence_log_likelihood",
    "set_num_threads",
    "sigmoid",
    "sigmoid_focal_loss",
    "softmax",
    "sparse_cross_entropy",
    "testing",
    "use_backend",
    "warmup",
]

if "_fastll_numba" in _sys.modules:
    _sys.modules["_fastll_numba"].fastll_is_here()
