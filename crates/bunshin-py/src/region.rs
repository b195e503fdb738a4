//! `Region`: host memory that can be guest RAM, seen through the buffer protocol.
use crate::{raise, refuse};
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::c_int;
use std::sync::Arc;

/// A block of zero-filled host memory that can be mapped as guest RAM.
///
/// Supports the buffer protocol (writable): `memoryview(region)` is a live view.
#[pyclass(frozen, module = "bunshin._native")]
pub struct Region {
    /// The memory itself.
    pub inner: Arc<bunshin_core::Region>,
}

#[pymethods]
impl Region {
    #[new]
    fn new(length: u64) -> PyResult<Self> {
        Ok(Self { inner: bunshin_core::Region::new(length).map_err(raise)? })
    }

    fn __len__(&self) -> usize {
        self.inner.length()
    }

    /// The first offset at or behind `start` where two regions of the same length differ.
    #[pyo3(signature = (other, start = 0))]
    fn difference(&self, py: Python<'_>, other: &Bound<'_, Self>, start: usize) -> PyResult<Option<usize>> {
        let other = &other.get().inner;
        if other.length() != self.inner.length() {
            return Err(refuse("memory-size", "regions of different lengths have no first difference"));
        }
        Ok(py.allow_threads(|| self.inner.difference(other, start)))
    }

    fn __repr__(&self) -> String {
        format!("<Region of {:#x} bytes>", self.inner.length())
    }

    /// # Safety
    ///
    /// Called by Python only: `view` is its buffer request.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no place for the buffer"));
        }
        let region = &slf.get().inner;
        let (host, length) = (region.host(), region.length() as ffi::Py_ssize_t);
        // SAFETY: view is valid; the memory lives as long as the region, to
        // which PyBuffer_FillInfo takes a reference that the view holds.
        let result = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), host.cast(), length, 0, flags) };
        if result == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}
