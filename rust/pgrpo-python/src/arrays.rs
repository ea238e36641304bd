//! Arrays of `NumPy`, and lists, as slices.
#![allow(unsafe_code, reason = "slices of memory that Python owns")]

use std::ffi::{c_char, c_int, c_long};

use numpy::npyffi::{NPY_ARRAY_ALIGNED, NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_WRITEABLE, NPY_TYPES};
use numpy::{Element, PyArray1, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pgrpo_core::AnyId;
use pgrpo_core::elements::Real;
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyList, PyString, PyTuple};

/// Real numbers as they lie in an array, which must not be written to while they are used.
pub(crate) enum Reals<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
}

/// Ids that need no conversion.
pub(crate) enum Ids<'a, 'py> {
    I32(&'a [i32]),
    I64(&'a [i64]),
    /// Integers and strings; they are kept alive here while a list may change.
    Objects(Vec<Bound<'py, PyAny>>),
}

impl Ids<'_, '_> {
    /// Hands the ids on in the form of the core.
    pub(crate) fn with<T>(&self, work: impl FnOnce(pgrpo_core::Ids<'_>) -> T) -> T {
        match self {
            Self::I32(ids) => work(pgrpo_core::Ids::I32(ids)),
            Self::I64(ids) => work(pgrpo_core::Ids::I64(ids)),
            Self::Objects(objects) => {
                let ids: Vec<AnyId<'_>> = objects.iter().filter_map(any_id).collect();
                work(pgrpo_core::Ids::Any(&ids))
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

/// The ids of an array or a list that needs no conversion.
pub(crate) fn ids<'a, 'py>(object: &'a Bound<'py, PyAny>) -> Option<Ids<'a, 'py>> {
    if let Some(array) = plain(object) {
        return match array.kind {
            // SAFETY: it is an array of that kind and size.
            Kind::I32 => Some(Ids::I32(unsafe { array.as_slice() })),
            Kind::I64 => Some(Ids::I64(unsafe { array.as_slice() })),
            _ => None,
        };
    }
    let objects: Vec<_> = if let Ok(list) = object.cast_exact::<PyList>() {
        list.iter().collect()
    } else {
        object.cast_exact::<PyTuple>().ok()?.iter().collect()
    };
    objects.iter().all(|object| any_id(object).is_some()).then_some(Ids::Objects(objects))
}

/// The numbers of an array that needs no conversion.
pub(crate) fn reals<'a>(object: &'a Bound<'_, PyAny>) -> Option<Reals<'a>> {
    let array = plain(object)?;
    match array.kind {
        // SAFETY: it is an array of that kind and size.
        Kind::F32 => Some(Reals::F32(unsafe { array.as_slice() })),
        Kind::F64 => Some(Reals::F64(unsafe { array.as_slice() })),
        _ => None,
    }
}

#[expect(clippy::mut_from_ref, reason = "the array is Python's, and checked to be nobody's input")]
/// An array to write reals of one kind to, if it shares no memory with the inputs.
pub(crate) fn reals_mut<'a, R: Real>(
    object: &'a Bound<'_, PyAny>,
    inputs: &[Option<&Bound<'_, PyAny>>],
) -> Option<&'a mut [R]> {
    let array = plain(object)?;
    let writeable = array.flags & NPY_ARRAY_WRITEABLE != 0;
    let kind = if size_of::<R>() == 4 { Kind::F32 } else { Kind::F64 };
    if !writeable || array.kind != kind {
        return None;
    }
    let range = array.addresses();
    let overlaps = |input: &&Bound<'_, PyAny>| {
        plain(input).is_some_and(|input| {
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
    Some(unsafe { std::slice::from_raw_parts_mut(array.start.cast(), array.length) })
}

/// An array of a few zeros. `NumPy`'s own zeros are the faster the more they are, and the slower the
/// fewer.
pub(crate) fn few<R: Element>(py: Python<'_>, size: usize) -> Bound<'_, PyArray1<R>> {
    // SAFETY: every number is written, and zeros are numbers.
    unsafe {
        let array = PyArray1::<R>::new(py, [size], false);
        std::ptr::write_bytes(array.data(), 0, size);
        array
    }
}

#[expect(clippy::mut_from_ref, reason = "nobody else has the array")]
/// The numbers of an array that was just made. `NumPy`'s own account of who borrows what would take as
/// long as a small batch.
pub(crate) fn fresh_mut<'a, R: Element>(
    array: &'a Bound<'_, PyArray1<R>>,
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

/// An array of one dimension, contiguous, aligned, in native byte order.
#[derive(Clone, Copy)]
struct Plain {
    kind: Kind,
    flags: c_int,
    length: usize,
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
    /// # Safety
    /// Its items are of type T, and live as long as `'a`.
    unsafe fn as_slice<'a, T>(&self) -> &'a [T] {
        // SAFETY: NumPy's own account of the array, which `plain` has checked.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.length) }
    }

    fn addresses(&self) -> std::ops::Range<usize> {
        let start = self.start.addr();
        start..start + self.length * self.kind.size()
    }
}

fn plain(object: &Bound<'_, PyAny>) -> Option<Plain> {
    // Subclasses may mean something else by their items: masked arrays do.
    let array = object.cast_exact::<PyUntypedArray>().ok()?;
    let wanted = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED;
    // SAFETY: a live array, whose fields are read as NumPy's macros do.
    let (fields, dtype) = unsafe {
        let fields = &(*array.as_array_ptr()).fields;
        (fields, &(*fields.descr).fields)
    };
    let swapped = if cfg!(target_endian = "little") { '>' } else { '<' } as c_char;
    if fields.nd != 1 || fields.flags & wanted != wanted || dtype.byteorder == swapped {
        return None;
    }
    // SAFETY: an array of one dimension has one length.
    let length = usize::try_from(unsafe { *fields.dimensions }).ok()?;
    // Zero items may have no address.
    let start =
        if length == 0 { std::ptr::dangling_mut::<u64>().cast() } else { fields.data.cast() };
    Some(Plain { kind: Kind::of(dtype.type_num)?, flags: fields.flags, length, start })
}
