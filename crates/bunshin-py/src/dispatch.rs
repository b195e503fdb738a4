//! `Dispatch`: exits to devices answered where they arrive, by calling the device's
//! own methods. The bus in Python decides who sits where and hands over its ranges;
//! whatever is not one plain access to one device goes back to it as an exit.
//!
//! This is the one place where a processor's thread touches devices, so the lock
//! that keeps several of them apart is taken here: `Entry::call`.
use crate::refuse;
use crate::vcpu::{MMIO_READ, MMIO_WRITE, PIO_IN, PIO_OUT};
use bunshin_core::{Exit, Reply};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyList};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// One device at one place: the bus's `Range`.
struct Entry {
    range: Py<PyAny>,
    base: u64,
    end: u64,
    width: u64,
    read: Py<PyAny>,
    write: Py<PyAny>,
    acquire: Py<PyAny>,
    release: Py<PyAny>,
    reads: AtomicU64,
    writes: AtomicU64,
}

impl Entry {
    fn new(range: &Bound<'_, PyAny>) -> PyResult<Self> {
        let lock = range.getattr("lock")?;
        Ok(Self {
            base: range.getattr("base")?.extract()?,
            end: range.getattr("end")?.extract()?,
            width: range.getattr("width")?.extract()?,
            read: range.getattr("read")?.unbind(),
            write: range.getattr("write")?.unbind(),
            acquire: lock.getattr("acquire")?.unbind(),
            release: lock.getattr("release")?.unbind(),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            range: range.clone().unbind(),
        })
    }

    /// Call a method of the device while its lock is held.
    fn call<'py>(
        &self,
        py: Python<'py>,
        method: &Py<PyAny>,
        offset: u64,
        size: u64,
        value: Option<u64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        call_no_arguments(py, &self.acquire)?;
        let result = call_numbers(py, method, offset, size, value);
        call_no_arguments(py, &self.release)?;
        // The bus says which device failed, in which call.
        result.map_err(|error| {
            let failure = self.range.bind(py).call_method1("failed", (error.value(py), offset, size, value));
            failure.map_or_else(|other| other, PyErr::from_value)
        })
    }

    fn read(&self, py: Python<'_>, address: u64, size: u64) -> PyResult<u64> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let answer = self.call(py, &self.read, address - self.base, size, None)?;
        // SAFETY: a live object, with the GIL. Any integer will do, as for `&` with a mask.
        let value = unsafe { ffi::PyLong_AsUnsignedLongLongMask(answer.as_ptr()) };
        if value == u64::MAX {
            if let Some(error) = PyErr::take(py) {
                let call = (error.value(py), address - self.base, size, None::<u64>);
                return Err(PyErr::from_value(self.range.bind(py).call_method1("failed", call)?));
            }
        }
        Ok(value & (u64::MAX >> (64 - 8 * size)))
    }

    fn write(&self, py: Python<'_>, address: u64, size: u64, value: u64) -> PyResult<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.call(py, &self.write, address - self.base, size, Some(value)).map(drop)
    }
}

/// `callable()`, without the tuple that pyo3 would make.
fn call_no_arguments<'py>(py: Python<'py>, callable: &Py<PyAny>) -> PyResult<Bound<'py, PyAny>> {
    // SAFETY: a live object, with the GIL; the result is a new reference or null.
    unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyObject_CallNoArgs(callable.as_ptr())) }
}

/// `callable(offset, size)` or `callable(offset, size, value)`.
fn call_numbers<'py>(
    py: Python<'py>,
    callable: &Py<PyAny>,
    offset: u64,
    size: u64,
    value: Option<u64>,
) -> PyResult<Bound<'py, PyAny>> {
    let number = |n: u64| -> PyResult<Bound<'py, PyInt>> { Ok(n.into_pyobject(py)?) };
    let (offset, size, value) = (number(offset)?, number(size)?, value.map(number).transpose()?);
    let end = std::ptr::null_mut::<ffi::PyObject>();
    let last = value.as_ref().map_or(end, |v| v.as_ptr());
    // SAFETY: live objects, with the GIL, and null behind the last one.
    unsafe {
        let result =
            ffi::PyObject_CallFunctionObjArgs(callable.as_ptr(), offset.as_ptr(), size.as_ptr(), last, end);
        Bound::from_owned_ptr_or_err(py, result)
    }
}

/// Entries of one address space, by base; they do not overlap.
#[derive(Default, Clone)]
struct Space(Vec<Arc<Entry>>);

impl Space {
    /// Who answers all of an access.
    fn find(&self, address: u64, size: u64) -> Option<&Arc<Entry>> {
        let entry = self.0[..self.0.partition_point(|e| e.base <= address)].last()?;
        (address + size <= entry.end && size <= entry.width).then_some(entry)
    }
}

#[derive(Default, Clone)]
struct Spaces {
    ports: Space,
    mmio: Space,
}

/// Which device answers where, for `Vcpu.serve`.
#[pyclass(frozen, module = "bunshin._native")]
#[derive(Default)]
pub struct Dispatch {
    spaces: Mutex<Arc<Spaces>>,
    /// Exits answered here, by kind.
    exits: [AtomicU64; 4],
}

impl Dispatch {
    fn spaces(&self) -> Arc<Spaces> {
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Answer an exit; None: it is not one plain access to one device.
    pub fn answer(&self, py: Python<'_>, exit: &Exit) -> PyResult<Option<Reply>> {
        let spaces = self.spaces();
        let (kind, address, size, value) = match *exit {
            Exit::PioIn { port, size, count: 1 } => (PIO_IN, port.into(), size, None),
            Exit::PioOut { port, size, ref data } if data.len() == usize::from(size) => {
                let mut value = [0; 8];
                value[..data.len()].copy_from_slice(data);
                (PIO_OUT, port.into(), size, Some(u64::from_le_bytes(value)))
            }
            Exit::MmioRead { gpa, size } => (MMIO_READ, gpa, size, None),
            Exit::MmioWrite { gpa, size, value } => (MMIO_WRITE, gpa, size, Some(value)),
            _ => return Ok(None),
        };
        let space = if matches!(kind, PIO_IN | PIO_OUT) { &spaces.ports } else { &spaces.mmio };
        let Some(entry) = space.find(address, size.into()) else { return Ok(None) };
        self.exits[usize::from(kind)].fetch_add(1, Ordering::Relaxed);
        Ok(Some(match value {
            Some(value) => {
                entry.write(py, address, size.into(), value)?;
                Reply::None
            }
            None => Reply::Value(entry.read(py, address, size.into())?),
        }))
    }
}

#[pymethods]
impl Dispatch {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Take over the ranges of the port space and of the MMIO space.
    fn replace(&self, ports: &Bound<'_, PyList>, mmio: &Bound<'_, PyList>) -> PyResult<()> {
        let old = self.spaces();
        let take = |ranges: &Bound<'_, PyList>, old: &Space| {
            let mut entries = Vec::with_capacity(ranges.len());
            for range in ranges {
                // Who stays keeps his counts.
                let known = old.0.iter().find(|e| e.range.is(&range));
                entries.push(known.map_or_else(|| Entry::new(&range).map(Arc::new), |e| Ok(e.clone()))?);
            }
            entries.sort_by_key(|e| e.base);
            if entries.windows(2).any(|pair| pair[0].end > pair[1].base) {
                return Err(refuse("overlap", "two ranges of a dispatch table overlap"));
            }
            Ok(Space(entries))
        };
        let new = Spaces { ports: take(ports, &old.ports)?, mmio: take(mmio, &old.mmio)? };
        *self.spaces.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        Ok(())
    }

    /// Exits answered here, by kind.
    fn exits(&self) -> HashMap<u8, u64> {
        (0..).zip(&self.exits).map(|(kind, count)| (kind, count.load(Ordering::Relaxed))).collect()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let Ok(spaces) = self.spaces.try_lock() else { return Ok(()) };
        for entry in spaces.ports.0.iter().chain(&spaces.mmio.0) {
            for object in [&entry.range, &entry.read, &entry.write, &entry.acquire, &entry.release] {
                visit.call(object)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        let old = std::mem::take(&mut *self.spaces.lock().unwrap_or_else(PoisonError::into_inner));
        drop(old);
    }

    /// `(range, reads, writes)` of every range: what was answered here.
    fn counts(&self, py: Python<'_>) -> Vec<(Py<PyAny>, u64, u64)> {
        let spaces = self.spaces();
        let count = |e: &Arc<Entry>| {
            let (reads, writes) = (e.reads.load(Ordering::Relaxed), e.writes.load(Ordering::Relaxed));
            (e.range.clone_ref(py), reads, writes)
        };
        spaces.ports.0.iter().chain(&spaces.mmio.0).map(count).collect()
    }
}
