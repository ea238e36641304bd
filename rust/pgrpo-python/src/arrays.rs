//! Arrays of `NumPy`, and lists, as slices.
#![allow(unsafe_code, reason = "slices of memory that Python owns")]

use std::borrow::Cow;
use std::ffi::{c_char, c_int, c_long};

use numpy::ndarray::{Dimension, IntoDimension};
use numpy::npyffi::{NPY_ARRAY_ALIGNED, NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_WRITEABLE, NPY_TYPES};
use numpy::{Element, PyArray, PyArray1, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pgrpo_core::{AnyId, Real};
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyList, PyString, PyTuple};

/// Real numbers as they lie in an array, which must not be written to while they are used.
pub(crate) enum Reals<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
}

/// Rows and columns of a batch \[P, G\], whose rows are groups; None of a batch \[N\].
pub(crate) type Grid = Option<[usize; 2]>;

/// Ids that need no conversion, one for each reward.
pub(crate) enum Ids<'a, 'py> {
    I32(Cow<'a, [i32]>),
    I64(Cow<'a, [i64]>),
    /// Integers and strings; they are kept alive here while a list may change.
    Objects(Vec<Bound<'py, PyAny>>),
}

impl Ids<'_, '_> {
    /// Hands the ids on in the form of the core.
    pub(crate) fn with<T>(&self, work: impl FnOnce(pgrpo_core::Ids<'_>) -> T) -> T {
        work(self.view(&mut Vec::new()))
    }

    /// The ids in the form of the core; `space` is filled with those that lie in objects.
    pub(crate) fn view<'s, 'o: 's>(&'o self, space: &'s mut Vec<AnyId<'o>>) -> pgrpo_core::Ids<'s> {
        match self {
            Self::I32(ids) => pgrpo_core::Ids::I32(ids),
            Self::I64(ids) => pgrpo_core::Ids::I64(ids),
            Self::Objects(objects) => {
                space.extend(objects.iter().filter_map(any_id));
                pgrpo_core::Ids::Any(space)
            }
        }
    }
}

/// A built-in int below 2^63 in magnitude, or a built-in string.
fn any_id<'a>(object: &'a Bound<'_, PyAny>) -> Option<AnyId<'a>> {
    if let Ok(name) = object.cast_exact::<PyString>() {
        return name.to_str().ok().map(AnyId::Name);
    }
    // Exactly an int: True would share the history of 1.
    object.cast_exact::<PyInt>().ok()?.extract().ok().map(AnyId::Int)
}

/// The ids of an array or a list that needs no conversion. Those of a batch \[P, G\] may be \[P\].
pub(crate) fn ids<'a, 'py>(object: &'a Bound<'py, PyAny>, grid: Grid) -> Option<Ids<'a, 'py>> {
    if let Some(array) = plain(object) {
        return match array.kind {
            // SAFETY: it is an array of that kind and size.
            Kind::I32 => Some(Ids::I32(unsafe { array.spread(grid) }?)),
            Kind::I64 => Some(Ids::I64(unsafe { array.spread(grid) }?)),
            _ => None,
        };
    }
    let mut objects = items(object)?;
    if let Some([rows, columns]) = grid {
        if objects.len() != rows {
            return None;
        }
        let mut spread = Vec::with_capacity(rows * columns);
        let mut num_rows = 0;
        for object in objects {
            match items(&object) {
                Some(row) if row.len() == columns => {
                    spread.extend(row);
                    num_rows += 1;
                }
                Some(_) => return None,
                None => spread.extend(std::iter::repeat_n(object, columns)),
            }
        }
        if num_rows != 0 && num_rows != rows {
            return None;
        }
        objects = spread;
    }
    objects.iter().all(|object| any_id(object).is_some()).then_some(Ids::Objects(objects))
}

fn items<'py>(object: &Bound<'py, PyAny>) -> Option<Vec<Bound<'py, PyAny>>> {
    if let Ok(list) = object.cast_exact::<PyList>() {
        return Some(list.iter().collect());
    }
    Some(object.cast_exact::<PyTuple>().ok()?.iter().collect())
}

/// The rows of a batch \[P, G\], as ids of groups.
pub(crate) fn rows<'py>([rows, columns]: [usize; 2]) -> Ids<'static, 'py> {
    #[expect(clippy::cast_possible_truncation, reason = "so many rewards are refused")]
    let row = |row| (row as u32).cast_signed();
    Ids::I32((0..rows).flat_map(|at| std::iter::repeat_n(row(at), columns)).collect())
}

/// The rewards of an array that needs no conversion. Several of each rollout lie on a last axis.
pub(crate) fn rewards<'a>(
    object: &'a Bound<'_, PyAny>,
    several: Option<usize>,
) -> Option<(Reals<'a>, Grid)> {
    let array = plain_rows(object, several.is_some())?;
    if several.is_some_and(|several| several != array.width) {
        return None;
    }
    let reals = match array.kind {
        // SAFETY: it is an array of that kind and size.
        Kind::F32 => Reals::F32(unsafe { array.as_slice() }),
        Kind::F64 => Reals::F64(unsafe { array.as_slice() }),
        _ => return None,
    };
    Some((reals, array.grid()))
}

/// The numbers of an array of float64 that needs no conversion. Those of a batch \[P, G\] may be \[P\].
pub(crate) fn numbers<'a>(object: &'a Bound<'_, PyAny>, grid: Grid) -> Option<Cow<'a, [f64]>> {
    let array = plain(object)?;
    // SAFETY: it is an array of that kind and size.
    if array.kind == Kind::F64 { unsafe { array.spread(grid) } } else { None }
}

#[expect(clippy::mut_from_ref, reason = "the array is Python's, and checked to be nobody's input")]
/// An array to write reals of one kind to, if it shares no memory with the inputs.
pub(crate) fn reals_mut<'a, R: Real>(
    object: &'a Bound<'_, PyAny>,
    grid: Grid,
    inputs: &[Option<&Bound<'_, PyAny>>],
) -> Option<&'a mut [R]> {
    let array = plain(object)?;
    let writeable = array.flags & NPY_ARRAY_WRITEABLE != 0;
    let kind = if size_of::<R>() == 4 { Kind::F32 } else { Kind::F64 };
    if !writeable || array.kind != kind || array.grid() != grid {
        return None;
    }
    let range = array.addresses();
    let overlaps = |input: &&Bound<'_, PyAny>| {
        plain(input).or_else(|| plain_rows(input, true)).is_some_and(|input| {
            let other = input.addresses();
            range.start < other.end && other.start < range.end
        })
    };
    if inputs.iter().flatten().any(overlaps) {
        return None;
    }
    // SAFETY: it is a writeable array of that kind and size, and none of the inputs. As with all of
    // NumPy, whoever writes to an array, or gives it as `out`, in another thread at the same time has
    // a race of their own making; lengths are fixed here, and every index is checked.
    Some(unsafe { std::slice::from_raw_parts_mut(array.start.cast(), array.length()) })
}

/// Below this many, `NumPy`'s own zeros take longer than zeros written here.
const FEW: usize = 4096;

/// An array of zeros.
pub(crate) fn zeros<R: Element, D: IntoDimension>(
    py: Python<'_>,
    shape: D,
) -> Bound<'_, PyArray<R, D::Dim>> {
    let shape = shape.into_dimension();
    let size = shape.size();
    if size >= FEW {
        return PyArray::zeros(py, shape, false);
    }
    // SAFETY: every number is written, and zeros are numbers.
    unsafe {
        let array = PyArray::new(py, shape, false);
        std::ptr::write_bytes(array.data(), 0, size);
        array
    }
}

#[expect(clippy::mut_from_ref, reason = "nobody else has the array")]
/// The numbers of an array that was just made. `NumPy`'s own account of who borrows what would take as
/// long as a small batch.
pub(crate) fn fresh_mut<'a, R: Element, D: Dimension>(
    array: &'a Bound<'_, PyArray<R, D>>,
) -> PyResult<&'a mut [R]> {
    // SAFETY: it is contiguous, and no reference to it has left this call.
    Ok(unsafe { array.as_slice_mut() }?)
}

/// Start and length of the bytes of an array, if they lie together and may be written to.
pub(crate) fn bytes_mut(array: &Bound<'_, PyArray1<u8>>) -> Option<(*mut u8, usize)> {
    let array = array.as_untyped();
    // SAFETY: a live array, whose fields are read as NumPy's macros do.
    let fields = unsafe { &(*array.as_array_ptr()).fields };
    let wanted = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_WRITEABLE;
    (fields.flags & wanted == wanted).then(|| (fields.data.cast(), array.len()))
}

/// An array of one or two dimensions, or one more, contiguous, aligned, in native byte order.
#[derive(Clone, Copy)]
struct Plain {
    kind: Kind,
    flags: c_int,
    rows: usize,
    columns: Option<usize>,
    /// Items in each place.
    width: usize,
    start: *mut u8,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    F32,
    F64,
    I32,
    I64,
}

impl Kind {
    fn of(type_num: c_int) -> Option<Self> {
        const FLOAT: c_int = NPY_TYPES::NPY_FLOAT as c_int;
        const DOUBLE: c_int = NPY_TYPES::NPY_DOUBLE as c_int;
        const INT: c_int = NPY_TYPES::NPY_INT as c_int;
        const LONG: c_int = NPY_TYPES::NPY_LONG as c_int;
        const LONG_LONG: c_int = NPY_TYPES::NPY_LONGLONG as c_int;
        match type_num {
            FLOAT => Some(Self::F32),
            DOUBLE => Some(Self::F64),
            INT => Some(Self::I32),
            LONG if size_of::<c_long>() == 4 => Some(Self::I32),
            LONG | LONG_LONG => Some(Self::I64),
            _ => None,
        }
    }

    fn size(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }
}

impl Plain {
    fn length(&self) -> usize {
        self.rows * self.columns.unwrap_or(1) * self.width
    }

    fn grid(&self) -> Grid {
        self.columns.map(|columns| [self.rows, columns])
    }

    /// # Safety
    /// Its items are of type T, and live as long as `'a`.
    unsafe fn as_slice<'a, T>(&self) -> &'a [T] {
        // SAFETY: NumPy's own account of the array, which `plain` has checked.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.length()) }
    }

    /// One item for each reward of a batch, which may all be those of a row; None if they are of
    /// another shape. Whether there are N of a batch \[N\] is left to the core.
    ///
    /// # Safety
    /// As for `as_slice`.
    unsafe fn spread<'a, T: Copy>(&self, grid: Grid) -> Option<Cow<'a, [T]>> {
        // SAFETY: as promised.
        let items: &[T] = unsafe { self.as_slice() };
        if self.grid().is_some() || grid.is_none() {
            return (self.grid() == grid).then_some(Cow::Borrowed(items));
        }
        let [rows, columns] = grid?;
        let spread = items.iter().flat_map(|&item| std::iter::repeat_n(item, columns));
        (self.rows == rows).then(|| spread.collect())
    }

    fn addresses(&self) -> std::ops::Range<usize> {
        let start = self.start.addr();
        start..start + self.length() * self.kind.size()
    }
}

fn plain(object: &Bound<'_, PyAny>) -> Option<Plain> {
    plain_rows(object, false)
}

/// The same; its last axis may be one beyond those of its shape, along which lie the items of a place.
fn plain_rows(object: &Bound<'_, PyAny>, has_width: bool) -> Option<Plain> {
    // Subclasses may mean something else by their items: masked arrays do.
    let array = object.cast_exact::<PyUntypedArray>().ok()?;
    let wanted = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED;
    // SAFETY: a live array, whose fields are read as NumPy's macros do.
    let (fields, dtype) = unsafe {
        let fields = &(*array.as_array_ptr()).fields;
        (fields, &(*fields.descr).fields)
    };
    let swapped = if cfg!(target_endian = "little") { '>' } else { '<' } as c_char;
    let num_axes = fields.nd - c_int::from(has_width);
    let known = num_axes == 1 || num_axes == 2;
    if !known || fields.flags & wanted != wanted || dtype.byteorder == swapped {
        return None;
    }
    // SAFETY: an array has as many lengths as dimensions.
    let length = |axis| usize::try_from(unsafe { *fields.dimensions.add(axis) }).ok();
    let rows = length(0)?;
    let columns = if num_axes == 2 { Some(length(1)?) } else { None };
    let width = if has_width { length(usize::try_from(num_axes).ok()?)? } else { 1 };
    let kind = Kind::of(dtype.type_num)?;
    let (flags, start) = (fields.flags, fields.data.cast());
    let mut array = Plain { kind, flags, rows, columns, width, start };
    if array.length() == 0 {
        // Zero items may have no address.
        array.start = std::ptr::dangling_mut::<u64>().cast();
    }
    Some(array)
}
