//! Guests with several processors, written in assembly: what they must be able to
//! rely on, however busy the host is.
mod atomics;
mod code;
mod interrupts;
mod life;
mod machine;
mod order;
mod paging;
