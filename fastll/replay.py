"""Calls on a GPU that are made again with other arrays of the same kind: their launches are kept.

On a GPU, all that a call does is to allocate memory and to launch kernels. What these are follows from
the function, its options and the geometry of its arrays: its key. The first call with a key goes by
`fastll.calls`, with every check. So does the second one, while a `Recorder` notes what it allocates and
launches. From the third one on, a `Plan` does the same without a view of any array. A call that
raises, or does something that is not noted, has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from itertools import pairwise
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np

from fastll import adapted
from fastll.array_libraries import Array, Device, Library, Shape

#: Number of keys that are kept. With one more, all are forgotten.
LIMIT = 1024
#: Bytes to which the parts of a block of memory are aligned, as a library aligns its arrays.
_ALIGNED = 256
#: Bits of an address that decide which kernel takes an array.
_LOW_BITS = 15

_SCALARS = frozenset((bool, int, float, str, type(None)))

#: What calls depend on beside their arguments, set by `fastll.dispatch`: the backend that was asked
#: for, and whether labels are checked.
settings: tuple[Callable[[], Any], Callable[[], Any]] = (bool, bool)

#: Plans by key: None if the next call is to be recorded, False if it cannot be.
_plans: dict[tuple[Any, ...], Plan | Literal[False] | None] = {}
_recorder: ContextVar[Recorder | None] = ContextVar("fastll_recorder", default=None)

#: Makes a function (stream, addresses) of launches: for each one, which of the addresses its words
#: take; and the number of addresses.
Programmer = Callable[[Sequence[Any], Sequence[dict[int, int]], int], Callable[..., None]]


class Recorder:
    """What a call has allocated, written to and launched."""

    def __init__(self) -> None:
        self.possible = True
        # views of new arrays, which keep their memory from being given out twice
        self.made: list[tuple[Array, tuple[Shape, np.dtype[Any], Shape | None]]] = []
        self.written: list[Any] = []
        self.launches: list[tuple[Programmer, Any, Sequence[Any], Sequence[bool]]] = []


def made(view: Array, shape: Shape, dtype: np.dtype[Any], order: Shape | None) -> None:
    """Note a new array."""
    if (recorder := _recorder.get()) is not None:
        recorder.made.append((view, (shape, dtype, order)))


def written(x: Any) -> None:
    """Note that an array is written to that the call was given."""
    if (recorder := _recorder.get()) is not None:
        recorder.written.append(x)


def launched(
    programmer: Programmer, launch: Any, words: Sequence[Any], addresses: Callable[[], Sequence[bool]]
) -> None:
    """Note a launch and its arguments, and which of them are addresses."""
    if (recorder := _recorder.get()) is not None:
        recorder.launches.append((programmer, launch, words, addresses()))


def prevent() -> None:
    """Note that a call does what cannot be made again."""
    if (recorder := _recorder.get()) is not None:
        recorder.possible = False


def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A public function's result for arguments of which the first is of a type in `on_gpu`."""
    on_gpu = adapted.on_gpu
    library: Library = on_gpu[type(args[0])]
    forced, debugging = settings
    key = [function, library, *kwargs, forced(), debugging()]
    arrays: list[Any] = []
    addresses: list[int] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        kind = type(value)
        if on_gpu.get(kind) is library:
            if arrays and (known := _index(arrays, value)) is not None:
                key.append(known)
                continue
            try:
                address, geometry = library.facts(value)
            except Exception:  # it has no memory of its own
                return function(*args, **kwargs)
            if geometry is None:
                return function(*args, **kwargs)
            arrays.append(value)
            addresses.append(address)
            key += address & _LOW_BITS, geometry
        elif kind in _SCALARS:
            key += kind, value or repr(value)  # 0.0 is not -0.0
        elif kind is tuple and all(type(item) is int for item in value):
            key.append(value)
        else:
            return function(*args, **kwargs)
    found = tuple(key)
    plan = _plans.get(found, False)
    if _recorder.get() is not None:
        return function(*args, **kwargs)
    if plan:
        done = plan(arrays, addresses)
        if done is not None:
            return done
    elif plan is None:
        return _record(found, library, arrays, addresses, function, args, kwargs)
    elif found not in _plans:
        if len(_plans) >= LIMIT:
            _plans.clear()
        _plans[found] = None
    return function(*args, **kwargs)


def _index(arrays: list[Any], x: Any) -> int | None:
    """Which of the arrays is x."""
    for i, array in enumerate(arrays):
        if array is x:
            return i
    return None


adapted.replay = call


def _record(
    key: tuple[Any, ...],
    library: Library,
    arrays: list[Any],
    addresses: list[int],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    recorder = Recorder()
    token = _recorder.set(recorder)
    try:
        result = function(*args, **kwargs)
    finally:
        _recorder.reset(token)
    plan = _planned(recorder, library, arrays, addresses, result)
    if plan is not None:
        _plans[key] = plan
    return result


class _Span:
    """The bytes of an array, and which object's address they are counted from."""

    def __init__(self, view: Array, slot: int, base: int | None = None, offset: int = 0) -> None:
        address = _address(view)
        reach = [s * (n - 1) for s, n in zip(view.strides, view.shape, strict=True)]
        self.low = address + sum(r for r in reach if r < 0)
        self.high = address + sum(r for r in reach if r > 0) + view.itemsize if view.size else self.low
        self.slot = slot
        self.shift = offset - (address if base is None else base)

    def __contains__(self, address: int) -> bool:
        return bool(self.low <= address < self.high)


def _address(view: Array) -> int:
    return int(view.__array_interface__["data"][0])


def _planned(
    recorder: Recorder, library: Library, arrays: list[Any], addresses: list[int], result: Any
) -> Plan | Literal[False] | None:
    """The plan of a call; False if there is none, None if there may be one of other arrays."""
    device = library.device(arrays[0])
    spans = [
        _Span(library.view(x, ""), i, base)
        for i, (x, base) in enumerate(zip(arrays, addresses, strict=True))
    ]
    if not (recorder.possible and recorder.launches) or any(s.low == s.high for s in spans):
        return False
    in_order = sorted(spans, key=lambda span: span.low)
    if any(a.high > b.low for a, b in pairwise(in_order)):
        return None  # whose an address is cannot be told
    results = result if isinstance(result, tuple) and len(result) > 1 else (result,)
    makers, objects, temporary, scratch = [], list(arrays), [], 0
    for view, what in recorder.made:
        owner = view.owner  # type: ignore[attr-defined]
        if _address(view) & _LOW_BITS:
            return False
        if any(owner is r for r in results):
            spans.append(_Span(view, len(objects)))
            objects.append(owner)
            makers.append(library.maker(*what, device))
        else:
            temporary.append((view, scratch))
            scratch += -(-view.nbytes // _ALIGNED) * _ALIGNED
    if scratch:  # one allocation for all of them
        spans += [_Span(view, len(objects), None, offset) for view, offset in temporary]
        makers.append(library.maker((scratch,), np.dtype(np.uint8), None, device))
    found = [[i for i, x in enumerate(objects) if x is r] for r in results]
    outputs = [[i for i, x in enumerate(arrays) if x is w] for w in recorder.written]
    if not all(found) or not all(outputs):
        return False
    sources = {(slot, 0): slot for slot in range(len(arrays) + len(makers))}
    places = []
    for _, _, words, are_addresses in recorder.launches:
        place = {}
        for i, (word, is_address) in enumerate(zip(words, are_addresses, strict=True)):
            if is_address and word:
                span = next((span for span in spans if word in span), None)
                if span is None:
                    return False
                source = span.slot, word + span.shift
                place[i] = sources.setdefault(source, len(sources))
        places.append(place)
    programmer, *_ = recorder.launches[0]
    program = programmer([launch for _, launch, *_ in recorder.launches], places, len(sources))
    within = list(sources)[len(arrays) + len(makers) :]
    extents = [(s.slot, s.low + s.shift, s.high + s.shift) for s in spans[: len(arrays)]]
    written = [(extents[i], [extent for extent in extents if extent[0] != i]) for i, *_ in outputs]
    returned = itemgetter(*[i for i, *_ in found])
    return Plan(library, device, makers, program, within, written, returned)


#: A given array: its number, and where its first byte and the one after its last are from its address.
Extent = tuple[int, int, int]


class Plan(NamedTuple):
    """What a call does. Its objects are the arrays that it is given, then those that it makes."""

    library: Library
    device: Device
    makers: list[Callable[[], Any]]  # of new arrays
    program: Callable[..., None]  # makes the launches
    within: list[tuple[int, int]]  # other addresses: so many bytes from that of an object
    outputs: list[tuple[Extent, list[Extent]]]  # what is written to of the given arrays; the others
    results: Callable[[list[Any]], Any]  # what is returned of the objects

    def __call__(self, arrays: list[Any], addresses: list[int]) -> Any:
        """Make the call again; None if that has to go the ordinary way."""
        library, device, makers, program, within, outputs, results = self
        for (output, first, last), others in outputs:
            at = addresses[output]
            for i, low, high in others:
                if addresses[i] + low < at + last and at + first < addresses[i] + high:
                    return None  # it shares bytes with another array
        address_of = library.address
        for make in makers:
            array = make()
            address = address_of(array)
            if address & _LOW_BITS:
                return None
            arrays.append(array)
            addresses.append(address)
        for (output, _, _), _ in outputs:
            library.writes(arrays[output])
        if within:
            addresses += [addresses[i] + offset for i, offset in within]
        program(library.stream(device), addresses)
        return results(arrays)
