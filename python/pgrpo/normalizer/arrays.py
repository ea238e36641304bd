"""Any array in, the same kind out: what a batch is read as, and what advantages go back as.

The core reads NumPy arrays of the plainest sort and exact lists of ids. Everything else that users
have is turned into those here: without a copy where it lies in memory like one of them already.
torch, pandas, polars and pyarrow are recognised, never imported: a tensor can only come from a torch
that is imported.
"""

from __future__ import annotations

import array
import re
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from pgrpo.errors import DataError
from pgrpo.types import ClusterId

if TYPE_CHECKING:
    import torch

    class Column(Protocol):
        """A column of pandas, polars or Arrow, or an array of JAX."""

        def __array__(self, *args: Any, **options: Any) -> NDArray[Any]: ...

    Array: TypeAlias = NDArray[Any] | torch.Tensor | Column
    Ids: TypeAlias = Sequence[ClusterId] | Sequence[Sequence[ClusterId]] | Array
    """[N], [P] or [P, G] names of clusters, or of groups."""
    Numbers: TypeAlias = Sequence[float] | Sequence[Sequence[float]] | Array
    """[N], [P] or [P, G]."""
    FloatT = TypeVar("FloatT", np.float32, np.float64)
    OutT = TypeVar(
        "OutT", NDArray[np.float32], NDArray[np.float64], torch.Tensor, array.array[float]
    )

    class Columns(TypedDict, total=False):
        """What a batch may have besides rewards, clusters and groups."""

        weights: Numbers | None
        score_norms: Numbers | None
        lengths: Numbers | None
        parents: Ids | None


Plain: TypeAlias = NDArray[Any]
"""[N] or [P, G] float32 or float64: contiguous, aligned, in native byte order."""

Shape: TypeAlias = tuple[int, ...]
"""(N,), or (P, G) of rewards whose rows are groups."""

NUMBERS = "fiubO"
"""Kinds of types of NumPy whose items may be real numbers."""

MAX_ID = 2**63
"""Ids are integers below this, and from minus this on."""


@contextmanager
def named_as_given(rewards: Any) -> Generator[None]:
    """A reward that is None is called that, though the core knows it as NaN."""
    try:
        yield
    except DataError as error:
        said = re.match(r"rewards\[([\d, ]+)\] is NaN", str(error))
        if said is None:
            raise
        value = rewards
        for place in said[1].split(", "):
            value = value[int(place)]
        if value is not None:
            raise
        raise DataError(str(error).replace("is NaN", "is None", 1)) from None


def call_plainly(
    call: Callable[..., Any],
    several: int | None,
    rewards: Any,
    clusters: Any,
    groups: Any,
    weights: Any,
    score_norms: Any,
    lengths: Any,
    parents: Any,
    out: Any,
) -> Any:
    """Call a method of the core that gives advantages, of arrays of any kind.

    Returns:
        Advantages of the kind and shape of `rewards`, or `out`.

    Raises:
        DataError: an argument is not what is expected of it.
    """
    values, shape, give_back = read_rewards(rewards, several)
    columns = clusters, groups, weights, score_norms, lengths, parents
    inputs = (values, *read_columns(shape, *columns))
    with named_as_given(rewards):
        if out is None:
            return give_back(call(*inputs, None))
        view = read_out(out, shape, values.dtype)
        if is_plain(view, inputs):
            call(*inputs, view)
        else:
            view[...] = call(*inputs, None)
    return out


def read_columns(
    shape: Shape,
    clusters: Any,
    groups: Any,
    weights: Any,
    score_norms: Any,
    lengths: Any,
    parents: Any,
) -> tuple[Any, ...]:
    """The columns of a batch beside its rewards, which are of a shape, as the core reads them.

    Raises:
        DataError: one of them is not what is expected of it.
    """
    return (
        read_ids(clusters, "clusters", shape),
        read_ids(groups, "groups", shape),
        read_numbers(weights, "weights", shape),
        read_numbers(score_norms, "score_norms", shape),
        read_numbers(lengths, "lengths", shape),
        read_ids(parents, "parents", shape),
    )


def read_rewards(rewards: Any, several: int | None) -> tuple[Plain, Shape, Callable[[Plain], Any]]:
    """Rewards [N] or [P, G] as float32 or float64, that shape, and the way back from advantages to
    their kind. Where there are several of each rollout, R, they are [N, R] or [P, G, R].

    float32 stays so, and so do narrower floats become; everything else becomes float64. None, nulls
    and masked entries are NaN.

    Raises:
        DataError: they are not real numbers of one or two dimensions.
    """
    found = _as_numpy(rewards, "rewards", "numbers")
    shape, several_of_each = found.shape, found.shape[:0]
    if several is not None:
        shape, several_of_each = shape[:-1], shape[-1:]
    fits = len(shape) in (1, 2) and several_of_each == (() if several is None else (several,))
    if not fits and found.dtype.kind in NUMBERS:
        expected = "[N], or [P, G] of groups"
        if several is not None:
            expected = f"[N, {several}], or [P, G, {several}] of groups"
        raise DataError(f"rewards has shape {found.shape}; expected {expected}")
    values = _plain(found, rewards, "rewards", np.float32 if _is_narrow(found) else np.float64)
    return values, shape, _way_back(rewards)


def read_numbers(values: Any, name: str, shape: Shape) -> NDArray[np.float64] | None:
    """Weights, score norms or lengths of rewards of a shape as float64.

    Raises:
        DataError: they are not real numbers of that shape, or one for each row.
    """
    if values is None:
        return None
    found = _as_numpy(values, name, "numbers")
    if found.dtype.kind in NUMBERS:
        _check_shape(found.shape, name, shape)
    return _plain(found, values, name, np.float64)


def read_ids(ids: Any, name: str, shape: Shape = (0,)) -> NDArray[Any] | list[Any] | None:
    """Ids of rewards of a shape as 32-bit or 64-bit integers, or as a list of built-in ints and
    strings, or of lists of such.

    Raises:
        DataError: one of them is neither an integer of 64 bits nor a string, or they are of another
            shape, and not one for each row either.
    """
    if ids is None:
        return None
    if isinstance(ids, list | tuple):
        rows = cast(Sequence[Any], ids)
        if len(shape) == 1 or not any(isinstance(row, list | tuple) for row in rows):
            if len(shape) == 2:
                _check_shape((len(rows),), name, shape)
            return _id_list(rows, name)
        return _id_rows(rows, name, shape)
    expected = "ints or strings"
    if isinstance(ids, str | bytes):
        raise DataError(f"{name} is {short(ids)}; expected [N] {expected}")
    found = _as_numpy(ids, name, expected)
    _check_shape(found.shape, name, shape)
    if _has_nulls(ids):
        # Among numbers nulls have become NaN; in a list they are what they were.
        missing = _to_list(ids)
        return _id_list(missing, name) if found.ndim == 1 else _id_rows(missing, name, shape)
    match found.dtype.kind:
        case "i" | "u":
            if found.dtype.kind == "u" and found.size and int(found.max()) >= MAX_ID:
                place = np.unravel_index(np.argmax(found >= MAX_ID), found.shape)
                where = ", ".join(map(str, place))
                raise _bad_int(f"{name}[{where}]", int(found[place]))
            kept = np.int32 if found.dtype == np.int32 else np.int64
            return _in_a_row(found, kept)
        case "U" | "T" | "O":
            values: list[Any] = found.tolist()
            return _id_list(values, name) if found.ndim == 1 else _id_rows(values, name, shape)
        case _:
            # A list of no ids has no type.
            if not found.size and isinstance(ids, Sequence):
                return []
            way_out = _way_out(found.ravel().tolist()[0]) if found.size else ""
            raise DataError(f"{name} has dtype {found.dtype}; expected {expected}{way_out}")


def read_out(out: Any, shape: Shape, dtype: np.dtype[Any]) -> Plain:
    """A writable view of the memory that advantages are asked to be written to.

    Raises:
        DataError: it is no array of the advantages' type and length, or cannot be written to.
    """
    if _is_tensor(out):
        if out.device.type != "cpu":
            raise DataError(f"out is a tensor on {out.device}; expected one on the CPU")
        if out.requires_grad:
            raise DataError("out is a tensor that requires grad; expected one that does not")
    elif not isinstance(out, np.ndarray) and not _is_buffer(out):
        raise DataError(f"out is {short(out)}; expected an array or a tensor to write to")
    view = np.asarray(out if _is_tensor(out) else _as_numpy(out, "out", "numbers"))
    if view.dtype != dtype:
        raise DataError(f"out has dtype {view.dtype}; expected {dtype}")
    if view.shape != shape:
        raise DataError(f"out has shape {view.shape}; expected {shape}")
    if not view.flags.writeable:
        raise DataError("out is read-only; expected an array that can be written to")
    return view


def is_plain(view: Plain, inputs: Sequence[Any]) -> bool:
    """Whether the core can write to it at once: it lies in a row, and apart from what is read."""
    flags = view.flags
    apart = not any(isinstance(i, np.ndarray) and np.may_share_memory(view, i) for i in inputs)
    return flags.c_contiguous and flags.aligned and view.dtype.isnative and apart


def short(value: object) -> str:
    """A value as a message can hold it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_tensor(values: Any) -> bool:
    return _is_of(values, "torch", "Tensor")


def _is_arrow(values: Any) -> bool:
    return _is_of(values, "pyarrow", "Array", "ChunkedArray")


def _is_of(values: Any, module: str, *types: str) -> bool:
    """Whether it is of one of a module's types, which can only be if the module is imported."""
    found = sys.modules.get(module)
    if found is None:
        return False
    return isinstance(values, tuple(getattr(found, name, ()) for name in types))


def _is_buffer(values: Any) -> bool:
    try:
        memoryview(values).release()
    except (TypeError, ValueError, BufferError):
        return False
    return not isinstance(values, bytes)


def _as_numpy(values: Any, name: str, expected: str) -> NDArray[Any]:
    """As an array of any type and shape, without a copy where possible."""
    try:
        if isinstance(values, np.ndarray):
            return _of_known_type(cast(NDArray[Any], values))
        if _is_tensor(values):
            return _from_torch(values)
        if _is_of(values, "pandas", "Series", "Index"):
            return _from_pandas(values)
        if _is_of(values, "polars", "Series"):
            return _from_polars(values)
        if _is_arrow(values):
            return values.to_numpy(zero_copy_only=False)
        if hasattr(values, "__dlpack__"):
            return _from_dlpack(values)
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError, BufferError, OverflowError):
        raise DataError(f"{name} is {short(values)}; expected [N] or [P, G] {expected}") from None


def _from_torch(tensor: Any) -> NDArray[Any]:
    torch: Any = sys.modules["torch"]
    if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
        # NumPy knows no bfloat16, and no float8.
        tensor = tensor.float()
    # One trip from the device; nothing is copied on the CPU.
    return tensor.numpy(force=True)


def _from_pandas(series: Any) -> NDArray[Any]:
    if isinstance(series.dtype, np.dtype):
        return series.to_numpy()
    # Nullable numbers know what NumPy calls them; text and categories are objects.
    dtype = np.dtype(getattr(series.dtype, "numpy_dtype", object))
    if dtype.kind not in "fiub":
        return series.to_numpy(object)
    if not series.hasnans:
        return series.to_numpy(dtype)
    return series.to_numpy(dtype if dtype.kind == "f" else np.float64, na_value=np.nan)


def _from_polars(series: Any) -> NDArray[Any]:
    polars: Any = sys.modules["polars"]
    # Beside nulls polars takes float32 for short integers.
    has_nulls = series.dtype.is_integer() and series.null_count()
    return (series.cast(polars.Float64) if has_nulls else series).to_numpy()


def _from_dlpack(values: Any) -> NDArray[Any]:
    from_dlpack: Any = np.from_dlpack
    try:
        return from_dlpack(values)
    except (BufferError, RuntimeError, TypeError, ValueError):
        if hasattr(values, "__array__"):
            # DLPack knows no types of ml_dtypes, in which JAX has bfloat16.
            return _of_known_type(np.asarray(values))
        # Memory of a device has to be copied, which has to be asked for.
        return from_dlpack(values, device="cpu")


def _of_known_type(values: NDArray[Any]) -> NDArray[Any]:
    """Numbers of ml_dtypes, of which NumPy knows only how many bytes they have, as NumPy's own."""
    if values.dtype.kind != "V" or values.dtype.type.__module__ != "ml_dtypes":
        return values
    return values.astype(np.int64 if "int" in values.dtype.name else np.float32)


def _has_nulls(values: Any) -> bool:
    """Whether entries of a column, or of a masked array, are missing."""
    if isinstance(values, np.ndarray):
        return isinstance(values, np.ma.MaskedArray) and bool(np.ma.is_masked(values))
    if _is_of(values, "pandas", "Series", "Index"):
        return values.hasnans
    if _is_of(values, "polars", "Series"):
        return values.null_count() > 0
    if _is_arrow(values):
        return values.null_count > 0
    return False


def _to_list(values: Any) -> list[Any]:
    if _is_arrow(values):
        return values.to_pylist()
    return values.to_list() if _is_of(values, "polars", "Series") else values.tolist()


def _is_narrow(values: NDArray[Any]) -> bool:
    return values.dtype.kind == "f" and values.dtype.itemsize <= 4


def _plain(values: NDArray[Any], given: Any, name: str, dtype: type[Any]) -> NDArray[Any]:
    """Real numbers as one row of a type."""
    if values.dtype.kind not in NUMBERS:
        # A list is known by what is in it.
        what = f"is {short(given)}" if isinstance(given, Sequence) else f"has dtype {values.dtype}"
        raise DataError(f"{name} {what}; expected [N] or [P, G] numbers")
    if values.dtype.kind == "O":
        entries = values.ravel().tolist()
        # NumPy would read the text "1.0" as a number.
        if any(isinstance(entry, str | bytes) for entry in entries):
            raise DataError(f"{name} is {short(given)}; expected [N] or [P, G] numbers")
        if (missing := getattr(sys.modules.get("pandas"), "NA", None)) is not None:
            kept = [None if entry is missing else entry for entry in entries]
            values = np.array(kept, object).reshape(values.shape)
    try:
        # None is no number, and NumPy's float64 for it is NaN.
        if isinstance(values, np.ma.MaskedArray):
            values = np.ma.filled(values.astype(dtype), np.nan)
        # Too large a number becomes infinite, which is dealt with as one.
        with np.errstate(over="ignore"):
            return _in_a_row(values, dtype)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{name} is {short(given)}; expected [N] or [P, G] numbers") from None


def _in_a_row(values: NDArray[Any], dtype: type[Any]) -> NDArray[Any]:
    """Contiguous, aligned and of a type in native byte order, without a copy where it is so."""
    flags = values.flags
    # NumPy takes longer to find that out than the core over a small batch.
    if (
        type(values) is np.ndarray
        and values.dtype == dtype
        and flags.c_contiguous
        and flags.aligned
    ):
        return values
    return np.require(values, dtype, ["C", "A", "E"])


def _way_back(rewards: Any) -> Callable[[Plain], Any]:
    """From advantages as NumPy has them to the kind of array that rewards are."""
    if _is_tensor(rewards):
        torch: Any = sys.modules["torch"]
        return lambda advantages: torch.from_numpy(advantages).to(rewards.device)
    if isinstance(rewards, np.ndarray):
        return lambda advantages: advantages
    if _is_of(rewards, "pandas", "Series"):
        pandas: Any = sys.modules["pandas"]
        return lambda advantages: pandas.Series(advantages, rewards.index, name=rewards.name)
    if _is_of(rewards, "polars", "Series"):
        polars: Any = sys.modules["polars"]
        return lambda advantages: polars.Series(rewards.name, advantages)
    if _is_arrow(rewards):
        pyarrow: Any = sys.modules["pyarrow"]
        if isinstance(rewards, pyarrow.ChunkedArray):
            return lambda advantages: pyarrow.chunked_array([advantages])
        return pyarrow.array
    if hasattr(rewards, "__array_namespace__"):
        namespace, device = rewards.__array_namespace__(), rewards.device
        return lambda advantages: namespace.asarray(advantages, device=device)
    if isinstance(rewards, array.array):
        return lambda advantages: array.array(advantages.dtype.char, advantages.tobytes())
    if _is_buffer(rewards):
        return lambda advantages: advantages.data
    if isinstance(rewards, Sequence):
        return lambda advantages: advantages.tolist()
    return lambda advantages: advantages


def _check_shape(found: Shape, name: str, shape: Shape) -> None:
    """Refuse what does not go with rewards of a shape. The core tells of lengths of one dimension."""
    if len(shape) == 1:
        if len(found) != 1:
            raise DataError(f"{name} has shape {found}; expected one dimension, [N]")
    elif found not in (shape, shape[:1]):
        raise DataError(
            f"rewards has shape {shape}, {name} has {found}; expected {shape[:1]} or {shape}"
        )


def _id_rows(rows: Sequence[Any], name: str, shape: Shape) -> NDArray[Any] | list[list[ClusterId]]:
    """Ids [P, G] as those of one row."""
    for index, row in enumerate(rows):
        if not isinstance(row, list | tuple) or len(cast(Sequence[Any], row)) != shape[1]:
            what = f"{name}[{index}] is {short(row)}"
            raise DataError(f"{what}; expected {shape[1]} ids, as many as a row of rewards has")
    _check_shape((len(rows), shape[1]), name, shape)
    if {type(value) for row in rows for value in row} == {int}:
        try:
            return np.array(rows, np.int64)
        except OverflowError:
            pass
    return [
        [_plain_id(value, name, f"{at}, {index}") for index, value in enumerate(row)]
        for at, row in enumerate(rows)
    ]


def _id_list(ids: Sequence[Any], name: str) -> NDArray[Any] | list[ClusterId]:
    """Ids as built-in ints and strings, which hash alike wherever they came from."""
    if set(map(type, ids)) == {int}:
        try:
            return np.array(ids, np.int64)
        except OverflowError:
            pass
    return [_plain_id(value, name, index) for index, value in enumerate(ids)]


def _plain_id(value: Any, name: str, index: int | str) -> ClusterId:
    if isinstance(value, str):
        text = str.__str__(value)
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            what = f"{name}[{index}] is {short(value)}"
            raise DataError(f"{what}, half of a surrogate pair; expected Unicode text")
        return text
    # True and 1.0 hash like 1: taken as they are, they would share its history in silence.
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        number = int(cast(int, value))
        if not -MAX_ID <= number < MAX_ID:
            raise _bad_int(f"{name}[{index}]", number)
        return number
    what = f"{name}[{index}] is {short(value)}"
    raise DataError(f"{what}; expected an int or a string{_way_out(value)}")


def _way_out(value: Any) -> str:
    """What to do where an id is neither an int nor a string."""
    missing = None, getattr(sys.modules.get("pandas"), "NA", None)
    if any(value is each for each in missing) or (isinstance(value, float) and value != value):
        return ": leave out what has no id, or give it one"
    if isinstance(value, bytes):
        return ": id.decode() makes one of it"
    if isinstance(value, float | bool):
        return ": int(id) or str(id) makes one of it"
    return ": str(id) makes one of it"


def _bad_int(where: str, value: int) -> DataError:
    return DataError(
        f"{where} is {short(value)}; expected an int of 64 bits, below 2^63, or a string"
    )
