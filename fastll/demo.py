"""The model of ``python -m fastll demo``: next-token prediction, fitted by maximum likelihood.

fastll computes every likelihood and its gradient, NumPy the matrix products.

The tokens are the 256 bytes, and the words, runs of spaces and punctuation marks that occur at least
twice in the training text. Anything else is spelled in bytes. So the softmax is over thousands of
tokens, as in a language model, and bits per byte are meaningful: any text is encoded without loss,
unknown words included.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

import fastll
from fastll import dispatch

Tokens = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]

MIN_BYTES = 20_000
MAX_BYTES = 2 << 20  # the rest of a longer file is not read: a minute of training sees less
MAX_VOCABULARY = 4096
BLOCK_BYTES = 2_000
HELDOUT_EVERY = 10  # every tenth block is held out, so that both parts are alike

CONTEXT = 6
EMBEDDING = 64
HIDDEN = 128
BATCH = 1024
LEARNING_RATE = 0.012
WARMUP_STEPS = 30
WEIGHT_DECAY = 0.5

_PIECE = re.compile(rb" ?[A-Za-z\x80-\xff]+|[0-9]|\n *|  +|[^A-Za-z0-9\s\x80-\xff]+|.", re.DOTALL)
# cut at the end of a line if possible, else at white space, else anywhere
_BLOCK = re.compile(
    rb".{%d,%d}\n|.{1,%d}(?:\s|\Z)|.{1,%d}" % (BLOCK_BYTES // 2, *(BLOCK_BYTES - 1,) * 3),
    re.DOTALL,
)
_CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
_PADDING = ord("\n")  # the context of the first token: an empty line


class TextError(ValueError):
    """The demo cannot use a text; the message says why."""


class Corpus(NamedTuple):
    """A text as tokens, in two parts."""

    vocabulary: tuple[bytes, ...]  # starts with the 256 bytes
    train: Tokens
    heldout: Tokens
    heldout_bytes: int


class Score(NamedTuple):
    """How well a model predicts the held-out text."""

    nll: float  # nats per token
    bits_per_byte: float
    perplexity: float  # per token


class Step(NamedTuple):
    """One step of training."""

    number: int  # from 1
    loss: float  # mean negative log-likelihood of the batch, nats per token
    likelihood_seconds: float  # spent in fastll
    progress: float  # fraction of the training completed


def default_text() -> bytes:
    """The documentation that ships inside CPython, about 370 kB of English and Python.

    Its topics repeat one another. Each paragraph is kept only once, so that training never sees a
    held-out one.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        message = "this Python has no pydoc_data.topics, the default text; expected a FILE"
        raise TextError(message) from None
    paragraphs = re.split(r"\n\s*\n", "\n\n".join(topics.values()))
    return "\n\n".join(dict.fromkeys(paragraphs)).encode()


def read_text(path: str | Path) -> bytes:
    """The text of a file, or its first `MAX_BYTES` bytes, in any encoding that extends ASCII."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise TextError(f"{path} cannot be read: {reason}; expected a text file") from None
    if len(text) < MIN_BYTES:
        raise TextError(f"{path} has {len(text):,} bytes; expected at least {MIN_BYTES:,}")
    # by its bytes: UTF-8, Latin-1 and similar encodings pass; UTF-16, images and archives do not
    if len(text) - len(text.translate(None, _CONTROL)) > len(text) // 100 or b"\0" in text:
        raise TextError(f"{path} is not text; expected UTF-8, without null characters")
    return text


def make_corpus(text: bytes) -> Corpus:
    """Split a text into a training and a held-out part, and both into tokens."""
    if len(text) < MIN_BYTES:
        raise TextError(f"text has {len(text):,} bytes; expected at least {MIN_BYTES:,}")
    blocks = _BLOCK.findall(text)
    heldout = b"".join(blocks[HELDOUT_EVERY - 1 :: HELDOUT_EVERY])
    del blocks[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    pieces = _PIECE.findall(b"".join(blocks))
    counts = Counter(piece for piece in pieces if len(piece) > 1)
    frequent = [piece for piece, n in counts.most_common(MAX_VOCABULARY - 256) if n > 1]
    vocabulary = (*(bytes([i]) for i in range(256)), *frequent)
    index = {piece: i for i, piece in enumerate(vocabulary)}
    train, held = _encode(pieces, index), _encode(_PIECE.findall(heldout), index)
    return Corpus(vocabulary, train, held, len(heldout))


def _encode(pieces: Iterable[bytes], index: dict[bytes, int]) -> Tokens:
    """Pieces as tokens; one that has no token is spelled in bytes, which are the tokens below 256."""
    tokens = ([index[piece]] if piece in index else piece for piece in pieces)
    return np.fromiter(chain.from_iterable(tokens), np.int64)


def contexts(tokens: Tokens) -> Tokens:
    """The `CONTEXT` tokens before each token, as a view of shape (tokens, CONTEXT)."""
    padded = np.concatenate((np.full(CONTEXT, _PADDING), tokens))
    return np.lib.stride_tricks.sliding_window_view(padded, CONTEXT)[: len(tokens)]


class Model:
    """Softmax of an affine function of a hidden layer over the embedded context.

    The model of Bengio et al., "A neural probabilistic language model" (2003). At first its embeddings
    and hidden layer are random and its output matrix is zero: it starts as the uniform distribution.
    """

    def __init__(self, vocabulary: int, seed: int, dtype: DTypeLike = np.float32) -> None:
        rng = np.random.default_rng(seed)
        inputs = CONTEXT * EMBEDDING
        self.embedding: Floats = rng.standard_normal((vocabulary, EMBEDDING)).astype(dtype)
        self.hidden: Floats = (rng.standard_normal((inputs, HIDDEN)) / inputs**0.5).astype(dtype)
        self.output: Floats = np.zeros((HIDDEN + 1, vocabulary), dtype)  # the last row is the bias
        self._logits: Floats = np.empty((BATCH, vocabulary), dtype)

    @property
    def parameters(self) -> list[Floats]:
        """The trained arrays."""
        return [self.embedding, self.hidden, self.output]

    def logits(self, context: Tokens) -> Floats:
        """Logits of at most `BATCH` tokens, which the next call overwrites."""
        return self._forward(self._embed(context))[1]

    def nll_and_gradients(self, context: Tokens, target: Tokens) -> tuple[float, list[Floats], float]:
        """Mean negative log-likelihood of at most `BATCH` tokens, its gradients in the order of the
        parameters, and the seconds spent in fastll."""
        embedded = self._embed(context)
        hidden, logits = self._forward(embedded)
        start = time.perf_counter()
        # in place: the logits are not needed any more
        loss, grad = fastll.cross_entropy(logits, target, return_grad=True, grad_out=logits)
        seconds = time.perf_counter() - start

        activation = hidden[:, :HIDDEN]
        grad_activation = (grad @ self.output[:HIDDEN].T) * (1 - activation * activation)
        grad_embedding = np.zeros_like(self.embedding)
        grad_embedded = (grad_activation @ self.hidden.T).reshape(-1, EMBEDDING)
        np.add.at(grad_embedding, context.ravel(), grad_embedded)
        gradients = [grad_embedding, embedded.T @ grad_activation, hidden.T @ grad]
        return float(loss), gradients, seconds

    def _embed(self, context: Tokens) -> Floats:
        return self.embedding[context].reshape(len(context), -1)

    def _forward(self, embedded: Floats) -> tuple[Floats, Floats]:
        hidden = np.ones((len(embedded), HIDDEN + 1), embedded.dtype)  # the last column is for the bias
        np.tanh(embedded @ self.hidden, out=hidden[:, :HIDDEN])
        return hidden, np.matmul(hidden, self.output, out=self._logits[: len(embedded)])


class Adam:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""

    def __init__(self, parameters: list[Floats]) -> None:
        self._parameters = parameters
        self._first = [np.zeros_like(p) for p in parameters]
        self._second = [np.zeros_like(p) for p in parameters]
        self._steps = 0

    def step(self, gradients: list[Floats], rate: float) -> None:
        """Change the parameters in place."""
        beta1, beta2 = 0.9, 0.99
        self._steps += 1
        unbiased = math.sqrt(1 - beta2**self._steps) / (1 - beta1**self._steps)
        for p, g, m, v in zip(self._parameters, gradients, self._first, self._second, strict=True):
            m[...] = beta1 * m + (1 - beta1) * g
            v[...] = beta2 * v + (1 - beta2) * (g * g)
            p *= 1 - rate * WEIGHT_DECAY
            p -= rate * unbiased * (m / (np.sqrt(v) + 1e-8))


def train(
    model: Model,
    corpus: Corpus,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
) -> Iterator[Step]:
    """Train a model in place, one step each time the iterator is advanced.

    The learning rate rises over the first steps and then falls linearly to zero: over `steps`, or over
    `seconds` if that is the only limit. No step but the first starts later than `seconds`. Given
    `steps`, the result depends only on the seed and the backend.
    """
    if steps is None and seconds is None:
        raise ValueError("steps and seconds are None; expected at least one limit")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds}; expected a positive number")
    return _train(model, corpus, steps, math.inf if seconds is None else seconds, seed)


def _train(
    model: Model, corpus: Corpus, steps: int | None, seconds: float, seed: int
) -> Iterator[Step]:
    rng = np.random.default_rng(seed)
    context = contexts(corpus.train)
    optimizer = Adam(model.parameters)
    start, progress = time.perf_counter(), 0.0
    for number in count(1):
        batch = rng.integers(0, len(context), BATCH)
        loss, gradients, spent = model.nll_and_gradients(context[batch], corpus.train[batch])
        optimizer.step(gradients, LEARNING_RATE * min(1, number / WARMUP_STEPS) * (1 - progress))
        elapsed = time.perf_counter() - start
        progress = min(1.0, number / steps if steps else elapsed / seconds)
        yield Step(number, loss, spent, progress)
        if progress >= 1 or elapsed >= seconds:
            return


@contextmanager
def backends_used() -> Iterator[list[str]]:
    """Record the names of the backends that the calls in a ``with`` block are given to."""
    names: list[str] = []
    choose = dispatch.choose

    def recorded(*arguments: Any, **options: Any) -> Any:
        backend = choose(*arguments, **options)
        if backend.name not in names:
            names.append(backend.name)
        return backend

    dispatch.choose = recorded
    try:
        yield names
    finally:
        dispatch.choose = choose


def evaluate(model: Model, corpus: Corpus) -> Score:
    """Score of a model on the held-out text, one batch at a time."""
    context, tokens = contexts(corpus.heldout), corpus.heldout
    likelihood = fastll.NegativeLogLikelihood()
    for start in range(0, len(tokens), BATCH):
        batch = slice(start, start + BATCH)
        likelihood.update(model.logits(context[batch]), tokens[batch])
    return _score(likelihood, corpus)


def uniform(corpus: Corpus) -> Score:
    """Score of the uniform distribution over the vocabulary."""
    return _score_of_weights(np.ones(len(corpus.vocabulary)), corpus)


def unigram(corpus: Corpus) -> Score:
    """Score of the token frequencies in the training text, each plus 1/2 (Krichevsky-Trofimov)."""
    frequency = np.bincount(corpus.train, minlength=len(corpus.vocabulary)) + 0.5
    return _score_of_weights(frequency, corpus)


def _score_of_weights(weights: Floats, corpus: Corpus) -> Score:
    """Score of one distribution for all tokens."""
    # every row has the same logits: a broadcast view, which fastll reads without a copy
    row = np.log(weights).astype(np.float32)
    logits = np.broadcast_to(row, (len(corpus.heldout), len(row)))
    return _score(fastll.NegativeLogLikelihood().update(logits, corpus.heldout), corpus)


def _score(likelihood: fastll.NegativeLogLikelihood, corpus: Corpus) -> Score:
    bits = likelihood.bits_per_token * likelihood.count
    return Score(likelihood.mean, bits / corpus.heldout_bytes, likelihood.perplexity)
