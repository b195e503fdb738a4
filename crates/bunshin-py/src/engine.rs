//! `Engine`: one machine's processors, memory map and interrupt controllers.
use crate::region::Region;
use crate::vcpu::Vcpu;
use crate::{raise, refuse};
use bunshin_core::Engine as _;
use bunshin_engines::{Machine, Name};
use bunshin_translator::Plant;
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;
use std::sync::Arc;

/// Processors, memory map and interrupt controllers of one machine.
#[pyclass(frozen, module = "bunshin._native")]
pub struct Engine {
    inner: Arc<Machine>,
}

fn not_ram(what: &str, gpa: u64, length: usize) -> PyErr {
    refuse("not-ram", format!("{what} {length:#x} bytes at gpa {gpa:#x}: part of it is not guest RAM"))
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (name, cpus = 1, plant = None, movable = false))]
    fn new(py: Python<'_>, name: &str, cpus: u32, plant: Option<&str>, movable: bool) -> PyResult<Self> {
        let direct = name == "direct";
        let name = if direct { Name::Translator } else { Name::parse(name).map_err(raise)? };
        let inner = py.allow_threads(|| Machine::new(name, cpus, movable)).map_err(raise)?;
        if direct {
            py.allow_threads(|| inner.run_directly()).map_err(raise)?;
        }
        if let Some(plant) = plant {
            let Some((_, plant)) = Plant::ALL.iter().find(|(n, _)| *n == plant) else {
                return Err(refuse("plant", format!("the translator cannot do {plant:?} wrong")));
            };
            inner.plant(*plant).map_err(raise)?;
        }
        Ok(Self { inner })
    }

    /// Let the engine `name` run the machine from now on.
    fn switch(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        let name = Name::parse(name).map_err(raise)?;
        py.allow_threads(|| self.inner.switch(name)).map_err(raise)
    }

    #[getter]
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    #[getter]
    fn tsc_hz(&self) -> u64 {
        self.inner.tsc_hz()
    }

    /// The host's time-stamp counter.
    fn host_tsc(&self) -> u64 {
        self.inner.host_tsc()
    }

    fn __repr__(&self) -> String {
        format!("<Engine {}>", self.inner.name())
    }

    /// Map part of a region at a guest-physical address.
    #[pyo3(signature = (gpa, region, offset, length, readonly = false))]
    fn map(
        &self,
        py: Python<'_>,
        gpa: u64,
        region: &Bound<'_, Region>,
        offset: u64,
        length: u64,
        readonly: bool,
    ) -> PyResult<()> {
        let region = &region.get().inner;
        py.allow_threads(|| self.inner.map(gpa, region, offset, length, readonly)).map_err(raise)
    }

    /// Unmap a guest-physical range.
    fn unmap(&self, py: Python<'_>, gpa: u64, length: u64) -> PyResult<()> {
        py.allow_threads(|| self.inner.unmap(gpa, length)).map_err(raise)
    }

    /// Copy out of guest RAM. Raises EngineError where it is not RAM.
    fn read<'py>(&self, py: Python<'py>, gpa: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = py.allow_threads(|| {
            // The last byte first: no allocation for lengths that cannot be.
            let last = gpa.checked_add((length as u64).checked_sub(1)?)?;
            if !self.inner.read(last, &mut [0]) {
                return None;
            }
            let mut bytes = Vec::new();
            bytes.try_reserve_exact(length).ok()?;
            bytes.resize(length, 0);
            self.inner.read(gpa, &mut bytes).then_some(bytes)
        });
        match bytes {
            Some(bytes) => Ok(PyBytes::new(py, &bytes)),
            None if length == 0 => Ok(PyBytes::new(py, b"")),
            None => Err(not_ram("reading", gpa, length)),
        }
    }

    /// Copy into guest RAM and drop translations of changed code.
    fn write(&self, py: Python<'_>, gpa: u64, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let store = |data: &[u8]| {
            if data.is_empty() || py.allow_threads(|| self.inner.write(gpa, data)) {
                Ok(())
            } else {
                Err(not_ram("writing", gpa, data.len()))
            }
        };
        if data.is_instance_of::<PyBytes>() {
            // Immutable, so it needs no copy while the GIL is released.
            store(&data.extract::<PyBackedBytes>()?)
        } else {
            store(&PyBuffer::<u8>::get(data)?.to_vec(py)?)
        }
    }

    /// Drive an interrupt line of the chipset.
    fn set_irq(&self, py: Python<'_>, gsi: u32, level: bool) {
        py.allow_threads(|| self.inner.set_irq(gsi, level));
    }

    /// Open or close the A20 gate: closed, bit 20 of every gpa is forced to 0.
    fn set_a20(&self, py: Python<'_>, open: bool) {
        py.allow_threads(|| self.inner.set_a20(open));
    }

    /// Let the guest's clocks stand at `ns` nanoseconds from now on; None: the host's time.
    #[pyo3(signature = (ns))]
    fn set_time(&self, py: Python<'_>, ns: Option<u64>) -> PyResult<()> {
        py.allow_threads(|| self.inner.set_time(ns)).map_err(raise)
    }

    /// Deliver a message-signalled interrupt.
    fn send_msi(&self, py: Python<'_>, address: u64, data: u32) {
        py.allow_threads(|| self.inner.send_msi(address, data));
    }

    /// Writes of `value` (any value if None) of `size` bytes to `address` signal
    /// `event` (an eventfd) and do not stop the processor.
    #[pyo3(signature = (address, size, value, event))]
    fn doorbell(
        &self,
        py: Python<'_>,
        address: u64,
        size: u8,
        value: Option<u64>,
        event: i32,
    ) -> PyResult<()> {
        py.allow_threads(|| self.inner.doorbell(address, size, value, event)).map_err(raise)
    }

    /// Pages written since the last call: one bit a page, first page in bit 0.
    fn take_dirty<'py>(&self, py: Python<'py>, gpa: u64, length: u64) -> PyResult<Bound<'py, PyBytes>> {
        let dirty = py.allow_threads(|| self.inner.take_dirty(gpa, length)).map_err(raise)?;
        Ok(PyBytes::new(py, &dirty))
    }

    /// Take virtual processor `index`; each can be taken once.
    fn vcpu(&self, py: Python<'_>, index: u32) -> PyResult<Vcpu> {
        let vcpu = py.allow_threads(|| self.inner.vcpu(index)).map_err(raise)?;
        Ok(Vcpu::new(index, vcpu))
    }
}
