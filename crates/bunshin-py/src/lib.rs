//! `bunshin._native`: the engine boundary for Python. Conversions only; what is
//! converted, and the contract, stands in `src/bunshin/_native.pyi`.
//!
//! | file      | class                                                   |
//! |-----------|---------------------------------------------------------|
//! | region.rs | `Region`, with the buffer protocol                      |
//! | engine.rs | `Engine`                                                |
//! | vcpu.rs   | `Vcpu`, and exits and replies                           |
//! | dispatch.rs | `Dispatch`: exits answered by calling devices         |
//!
//! `Vcpu.run`, `Vcpu.serve` and every call of `Engine` release the GIL: they may wait for a
//! processor, and one whose exit is being handled in Python needs the GIL.
#![deny(missing_docs)]

mod dispatch;
mod engine;
mod region;
mod vcpu;

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;

pyo3::create_exception!(
    bunshin._native,
    EngineError,
    PyException,
    "The host or the engine refused; `args == (slug, sentence)`."
);

/// An exception with the slug and the sentence of an error.
fn raise(error: bunshin_core::EngineError) -> PyErr {
    refuse(error.slug, error.message)
}

fn refuse(slug: &'static str, sentence: impl Into<String>) -> PyErr {
    EngineError::new_err((slug, sentence.into()))
}

/// Rate of the host's time-stamp counter in Hz.
#[pyfunction]
fn tsc_hz(py: Python<'_>) -> u64 {
    // The first call may have to measure.
    py.allow_threads(bunshin_core::clock::tsc_hz)
}

/// What the translator needs of the host processor, by name.
#[pyfunction]
fn host_features(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let features = PyDict::new(py);
    for (name, present) in bunshin_translator::host::features() {
        features.set_item(name, present)?;
    }
    Ok(features)
}

/// Figures of what KVM on this host is worth, by name; from a throwaway machine.
#[pyfunction]
fn probe_kvm(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let f = py.allow_threads(bunshin_kvm::probe::measure);
    let figures = PyDict::new(py);
    figures.set_item("refusal", f.refusal)?;
    figures.set_item("trouble", f.trouble)?;
    figures.set_item("machine", f.machine)?;
    figures.set_item("long_mode", f.long_mode)?;
    figures.set_item("instruction_ns", f.instruction_ns)?;
    figures.set_item("cmpxchg16b", f.cmpxchg16b)?;
    figures.set_item("xsave", f.xsave)?;
    figures.set_item("slots", f.slots)?;
    figures.set_item("cpus", f.cpus)?;
    figures.set_item("took_us", f.took_us)?;
    Ok(figures)
}

/// Whether the host gives breakpoints for direct execution; an EngineError says why that is
/// not possible here at all.
#[pyfunction]
fn direct_execution(py: Python<'_>) -> PyResult<bool> {
    py.allow_threads(bunshin_translator::probe_direct).map_err(raise)
}

/// Write names of translated code for perf to `path`, for the whole process.
#[pyfunction]
fn perf_map(py: Python<'_>, path: PathBuf, symbols: Vec<(u64, String)>) -> PyResult<()> {
    py.allow_threads(|| bunshin_translator::perf_map::start(&path, symbols)).map_err(raise)
}

/// The first instruction of some code as text, and its length in bytes.
#[pyfunction]
fn disassemble(code: &[u8], bits: u32, ip: u64) -> PyResult<(String, usize)> {
    if !matches!(bits, 16 | 32 | 64) {
        return Err(refuse("bits", format!("code of {bits} bits, expected 16, 32 or 64")));
    }
    Ok(bunshin_translator::disassemble(code, bits, ip))
}

/// The engine boundary as Python sees it.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    bunshin_core::panics::install();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("EngineError", module.py().get_type::<EngineError>())?;
    module.add_class::<region::Region>()?;
    module.add_class::<engine::Engine>()?;
    module.add_class::<vcpu::Vcpu>()?;
    module.add_class::<dispatch::Dispatch>()?;
    for (name, kind) in vcpu::KINDS {
        module.add(name, kind)?;
    }
    module.add_function(wrap_pyfunction!(tsc_hz, module)?)?;
    module.add_function(wrap_pyfunction!(disassemble, module)?)?;
    module.add_function(wrap_pyfunction!(perf_map, module)?)?;
    module.add_function(wrap_pyfunction!(probe_kvm, module)?)?;
    module.add_function(wrap_pyfunction!(direct_execution, module)?)?;
    module.add_function(wrap_pyfunction!(host_features, module)?)
}
