//! Lets the code ask `cfg(Py_GIL_DISABLED)`: whether the interpreter has no lock.

fn main() {
    pyo3_build_config::use_pyo3_cfgs();
}
