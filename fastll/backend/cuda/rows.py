"""What belongs to a row and becomes of its state, whatever the threads of the row are.

Texts, bound to the names of a variant: see `fastll.backend.cuda.folds`.
"""

# mypy: ignore-errors
# ruff: noqa: F403, F405

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastll.backend.cuda.compiler import cuda
from fastll.backend.cuda.primitives import wait_for_copies, wait_for_rows
from fastll.backend.cuda.states import *


class Label(NamedTuple):
    """The label of a row, and what belongs to it."""

    number: int  # -1: none of the classes
    sample: float  # weight of the row; 0: it does not count
    logit: float
    weight: float
    slope: float  # of the cap


class Finished(NamedTuple):
    """What is known of a row when all of its elements are."""

    value: float
    maximum: float
    log_s: float
    factor: float  # of exp(x - maximum) in what is written
    at_label: float  # the gradient there
    scale: float  # of the gradient, the sample weight included
    mean: float  # of the distance from the maximum
    target_maximum: float  # of a second array of logits
    target_factor: float  # of exp(t - target_maximum)


class Scales(NamedTuple):
    """What exponentials are multiplied with to become what is written."""

    peak: float  # what that of the maximum becomes, before `second`
    first: float
    second: float


class Writer(NamedTuple):
    """What elements are relative to, and the `Scales` of their exponentials; the same of a second array
    of logits."""

    ref: Reference
    scales: Scales
    target_ref: Reference
    target_scales: Scales


def find_label(call, place, memory):
    """The `Label` of the row at `place`."""
    number, sample, logit, weight, slope = np.int64(-1), c.one, c.zero, c.one, c.one
    if sampled and place.live:
        sample = read_sample(start_of(call.sample, place))
    if sparse and place.live:
        number, kept = label_within(call, label_of(call, place))
        if not kept:
            sample = c.zero
        if number >= 0:
            logit = element(call, place, memory, number)
            if capped:
                logit, slope = softcap(logit, call.softcap)
            if weighted_classes:
                weight = read_weight(call.weight.address + number * call.weight.step)
    return Label(number, sample, logit, weight, slope)


def label_within(call, y):
    """(the label, whether it is kept); -1 for one outside of the classes, which is checked here, where
    the label is used."""
    kept = y != call.ignore_index
    return (y if 0 <= y < call.classes else np.int64(-1)), kept


def arrive(memory, arrivals):
    """Wait for rows on their way to shared memory; `arrivals` is the byte of the barrier of copies in
    bulk."""
    if modern and not in_bulk:
        wait_for_copies()
    cuda.syncthreads()
    if in_bulk:
        wait_for_rows(memory, arrivals)


def target_of(call, t, j):
    """u = w ((1 - eps) t + eps / C) of class j; or its target logit."""
    if divergence:
        return tempered_element(call, t)
    u = smoothed(t, call.keep, call.spread) if dense else call.spread
    if weighted_classes:
        u *= read_weight(call.weight.address + j * call.weight.step)
    return u


def tempered_element(call, x):
    """An element times the inverse temperature."""
    return x * call.inverse_temperature if tempered else x


def read_divisor(call):
    """What the gradient of all rows is multiplied with besides their `scale`."""
    return read_number(call.divisor) if call.divisor != 0 else c.one


def gradient_scale(call, divisor, label):
    """The factor of the gradient of the label's row."""
    scale = call.scale * divisor
    if sampled:  # of a row that is dropped it may be NaN: a mean over nothing
        scale = product(label.sample, scale)
    return scale


def z_loss_of(call):
    """The factor of lse**2; in a mean, which is over the rows, times their weight over their number."""
    if averaged:
        return call.z_loss * (read_number(call.row_divisor) / read_number(call.divisor))
    return call.z_loss


def finished(call, state, label, scale):
    """What becomes of the state of a row; `scale` is that of the gradient."""
    m = state.maximum
    log_s, above, s = sums_of(state)
    value, factor, at_label, mean = m + log_s, c.one / s, c.zero, c.zero
    if cross_entropies:
        value, factor, at_label = cross_entropy(call, state, label, scale, log_s, above, s)
    if entropic:
        away = state.distance.high + state.distance.low
        value, mean = softmax_entropy(log_s, away, s), away / s
        factor = tempered_element(call, scale) / s
        if abs(m) == c.infinity:
            value = c.nan
    if abs(m) == c.infinity or (sparse and label.number < 0):
        factor, at_label = c.nan, c.nan
    return Finished(value, m, log_s, factor, at_label, scale, mean, c.zero, c.zero)


def sums_of(state):
    """(log s, s - 1, s)."""
    rest = plus(state.below, state.at_maximum - c.one)
    if state.maximum == -c.infinity:
        rest = Sum(state.below.high, rest.low)  # 0, or NaN
    log_s = log1p_sum(rest)
    above = rest.high + rest.low
    return log_s, above, c.one + above


def only(value, factor, at_label, scale):
    """What is known of a row without exponentials."""
    return Finished(value, c.zero, c.zero, factor, at_label, scale, c.zero, c.zero, c.zero)


def cross_entropy(call, state, label, scale, log_s, rest, s):
    """Loss, factor of exp(x - m) in the gradient, gradient at the label."""
    m, at_point, u_y, e_y = state.maximum, c.zero, c.zero, c.zero
    z_loss = z_loss_of(call)
    mass, distance = state.mass.high + state.mass.low, state.distance.high + state.distance.low
    if sparse:
        at_point, u_y = call.keep * label.weight, call.spread * label.weight
        e_y = exp_minus_scaled(label.logit, m) * c.unshift
    loss = cross_entropy_loss(m, log_s, at_point, label.logit, mass, distance, z_loss)
    if (m == -c.infinity and call.classes > 0) or (sparse and label.number < 0):
        loss = c.nan
    # e_y - 1 cancels only where the label is the maximum, and is exact there
    total, at_label = cross_entropy_gradient(
        m + log_s, s, rest, at_point, u_y, mass, z_loss, e_y, e_y - c.one
    )
    return loss, scale * total / s, scale * label.slope * at_label


def store_results(call, place, label, row):
    if call.value.address != 0:
        value = row.value
        if sampled:
            value *= label.sample
        if dropping and label.sample == c.zero:
            value = c.zero
        write_value(start_of(call.value, place), value)
    if call.lse.address != 0:
        write_value(start_of(call.lse, place), row.maximum + row.log_s)


def select(call, places, row, first, step):
    """Write the log-probabilities of the row's labels from the `first` on; `places` are the addresses
    of the row in x, in the labels and in what is written."""
    x, index, target = places
    for k in range(np.int64(first), call.wanted, np.int64(step)):
        y, value = read_label(index + k * call.choices.classes), c.nan
        if 0 <= y < call.classes:
            logit = tempered_element(call, read_x(x + y * call.x.classes))
            value = log_probability(logit, row.maximum, row.log_s)
        write_value(target + k * call.selected.classes, value)


def scales_of(factor, fall, lead):
    """The `Scales` of a factor of exp(x - m), where exponentials are relative to a maximum M <= m and
    `fall` is 2**SHIFT exp(M - m).

    The product of all factors may be no normal number where results are: then it is applied in two
    steps, of which the second one is exact.
    """
    down, whole = fall * c.unshift, factor * fall
    peak = factor * down if down >= c.least else whole * c.unshift
    first = peak / lead
    if abs(first) >= c.least:
        return Scales(peak, first, c.one)
    return Scales(whole / c.unshift, whole / (lead * c.unshift), c.unshift * c.unshift)


def writer_of(row, ref, fall):
    """The `Writer` of a row; `ref` and `fall` are as for `scales_of`."""
    if approximate:
        line, first = lifted_line(ref, row.factor)
        scales = Scales(row.factor, first, c.one)
        if divergence:
            target, factor = lifted_line(reference(row.target_maximum), row.target_factor)
            return Writer(line, scales, target, Scales(row.target_factor, factor, c.one))
        return Writer(line, scales, line, scales)
    scales = scales_of(row.factor, fall, ref.lead)
    if divergence:
        target = reference(row.target_maximum)
        return Writer(ref, scales, target, scales_of(row.target_factor, fall, target.lead))
    return Writer(ref, scales, ref, scales)


def share(e, ref, scales):
    """An `exponential` times its factor."""
    if approximate:
        return e * scales.first
    value = probability(e, ref.lead, scales.peak, scales.first)
    return value * scales.second if factored or apart else value


def written_of(call, x, u, row, writer):
    """What is written of an element, or of its exponential where that is `held`."""
    e, slope, m = x, c.one, row.maximum
    if not held:
        x = tempered_element(call, x)
    if nll:
        return less_target(row.factor, u, row.scale) if targets else row.factor
    if logs:
        value = log_probability(x, m, row.log_s)
        if abs(m) == c.infinity and (value > -c.infinity or m < c.zero):
            value = c.nan
        return value
    if capped:
        x, slope = softcap(x, call.softcap)
    if not held:
        e = relative(x, writer.ref)
    value = share(e, writer.ref, writer.scales)
    if entropic:
        value = entropy_slope(value, x, m, row.mean)
    if divergence:
        value -= share(relative(u, writer.target_ref), writer.target_ref, writer.target_scales)
    if targets:
        value = less_target(value, u, row.scale)
    return value * slope if capped else value
