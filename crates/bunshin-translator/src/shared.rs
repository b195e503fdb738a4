//! What other threads may touch of a virtual processor, and the machine's
//! processors as each of them sees the others.
use crate::gate::{Gate, Walker};
use crate::pages::Pages;
use crate::signals;
use bunshin_core::clock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// What a processor must do before it runs translated code again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// Drop the translations of a page (index in `Pages`).
    DropCode(usize),
    /// Drop the store tags for a page.
    DropStores(usize),
}

/// Orders that are kept apart; one more and everything is dropped.
const MOST_ORDERS: usize = 1024;

/// Orders not carried out yet.
#[derive(Default, Debug)]
pub struct Orders {
    pub list: Vec<Order>,
    /// There were too many: drop all translations and all store tags.
    pub all: bool,
}

impl Orders {
    fn push(&mut self, order: Order) {
        if self.all || self.list.last() == Some(&order) {
            return;
        }
        if self.list.len() == MOST_ORDERS {
            self.list = Vec::new();
            self.all = true;
            return;
        }
        self.list.push(order);
    }
}

/// One processor as other threads see it.
pub struct Shared {
    /// `Cpu::pending` in the processor page; 0 once that is gone.
    pending: Mutex<usize>,
    /// `inside` is kept: there are others.
    gated: bool,
    /// The owner asked `run` to return.
    pub kicked: AtomicBool,
    pub thread: AtomicU32,
    /// Between `Gate::come_in` and `Gate::go_out`.
    inside: AtomicBool,
    /// `orders` is not empty.
    ordered: AtomicBool,
    orders: Mutex<Orders>,
    /// Poked since the processor last looked.
    halt: Mutex<bool>,
    wake: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// `pending` is used until [`Shared::forget`]; `gated` processors go through the
    /// gate, the only one of a machine does not.
    pub fn new(pending: *const AtomicU32, gated: bool) -> Self {
        Self {
            pending: Mutex::new(pending as usize),
            gated,
            kicked: AtomicBool::new(false),
            thread: AtomicU32::new(0),
            inside: AtomicBool::new(false),
            ordered: AtomicBool::new(false),
            orders: Mutex::default(),
            halt: Mutex::new(false),
            wake: Condvar::new(),
        }
    }

    /// Make the processor look at its events soon.
    pub fn poke(&self) {
        let before = {
            let pending = lock(&self.pending);
            if *pending == 0 {
                return;
            }
            // SAFETY: the processor page is mapped until `forget`, which takes the lock.
            unsafe { &*(*pending as *const AtomicU32) }.swap(1, Ordering::SeqCst)
        };
        *lock(&self.halt) = true;
        self.wake.notify_one();
        if self.gated && !self.inside.load(Ordering::SeqCst) {
            // It looks at `pending` after it has come in.
            return;
        }
        let thread = self.thread.load(Ordering::Acquire);
        if before == 0 && thread != 0 && thread != signals::thread_id() {
            signals::kick(thread);
        }
    }

    /// The processor page goes away.
    pub fn forget(&self) {
        *lock(&self.pending) = 0;
    }

    /// Pokes from now on wake the next [`Shared::sleep`].
    pub fn listen(&self) {
        *lock(&self.halt) = false;
    }

    /// Sleep until poked since [`Shared::listen`], or until `deadline`, nanoseconds
    /// of CLOCK_MONOTONIC.
    pub fn sleep(&self, deadline: Option<u64>) {
        let woken = lock(&self.halt);
        if *woken {
            return;
        }
        match deadline {
            Some(d) => {
                let now = clock::now_ns();
                if d > now {
                    drop(self.wake.wait_timeout(woken, Duration::from_nanos(d - now)));
                }
            }
            None => drop(self.wake.wait(woken)),
        }
    }

    /// Leave an order. It is carried out when the processor comes to its next safe
    /// point, which an exclusive section or a poke brings about.
    pub fn order(&self, order: Order) {
        lock(&self.orders).push(order);
        self.ordered.store(true, Ordering::Release);
    }

    /// Order to drop everything that was made of memory.
    pub fn order_all(&self) {
        *lock(&self.orders) = Orders { list: Vec::new(), all: true };
        self.ordered.store(true, Ordering::Release);
    }

    /// Take the orders left so far.
    pub fn take_orders(&self) -> Option<Orders> {
        if !self.ordered.load(Ordering::Acquire) {
            return None;
        }
        let mut orders = lock(&self.orders);
        self.ordered.store(false, Ordering::Release);
        Some(std::mem::take(&mut *orders))
    }
}

impl Walker for Shared {
    fn inside(&self) -> &AtomicBool {
        &self.inside
    }
    fn hurry(&self) {
        self.poke();
    }
}

impl bunshin_core::Kicker for Shared {
    fn kick(&self) {
        self.kicked.store(true, Ordering::Release);
        self.poke();
    }
}

/// One moment on the two clocks that the guest's time is made of.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Host time-stamp counter.
    pub tsc: u64,
    /// CLOCK_MONOTONIC, nanoseconds.
    pub ns: u64,
    /// The guest's system time then, nanoseconds.
    pub system_ns: u64,
}

impl Moment {
    /// Now; of some looks the one that took least between the two clocks.
    pub fn now() -> Self {
        let look = || {
            let before = clock::rdtsc();
            let ns = clock::now_ns();
            let after = clock::rdtsc();
            (
                after.wrapping_sub(before),
                Self { tsc: before.wrapping_add(after.wrapping_sub(before) / 2), ns, system_ns: 0 },
            )
        };
        let (_, best) = (0..8).map(|_| look()).min_by_key(|l| l.0).unwrap_or_else(look);
        best
    }
}

/// The processors of one machine.
pub struct Crew {
    all: Vec<OnceLock<Arc<Shared>>>,
    /// Made when the first processor is taken: the memory map is final then.
    pages: OnceLock<Arc<Pages>>,
    pub gate: Gate,
    /// When the guest's time is zero, on all processors alike.
    pub start: Moment,
}

impl Crew {
    pub fn new(cpus: u32) -> Self {
        Self {
            all: (0..cpus).map(|_| OnceLock::new()).collect(),
            pages: OnceLock::new(),
            gate: Gate::default(),
            start: Moment::now(),
        }
    }

    /// The machine has one processor.
    pub fn single(&self) -> bool {
        self.all.len() == 1
    }

    /// The pages' words; `count` counts for the first call.
    pub fn pages(&self, count: usize) -> Arc<Pages> {
        self.pages.get_or_init(|| Arc::new(Pages::new(count))).clone()
    }

    /// The pages' words once there is a processor.
    pub fn known_pages(&self) -> Option<&Pages> {
        self.pages.get().map(|p| &**p)
    }

    /// Processor `index` exists from now on.
    pub fn join(&self, index: u32, shared: Arc<Shared>) {
        let _ = self.all[index as usize].set(shared);
    }

    /// A processor that has been taken.
    pub fn get(&self, index: u32) -> Option<&Shared> {
        self.all.get(index as usize)?.get().map(|s| &**s)
    }

    /// Those of the bits in `set` (1 << index) that have been taken.
    pub fn those(&self, set: u64) -> impl Iterator<Item = &Shared> + Clone {
        let named = move |n: &usize| set >> n & 1 != 0;
        (0..self.all.len()).filter(named).filter_map(|n| self.all[n].get().map(|s| &**s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_orders_become_one() {
        let pending = AtomicU32::new(0);
        let s = Shared::new(&pending, true);
        assert!(s.take_orders().is_none());
        s.order(Order::DropCode(3));
        s.order(Order::DropCode(3));
        s.order(Order::DropStores(3));
        let o = s.take_orders().unwrap();
        assert_eq!((o.list, o.all), (vec![Order::DropCode(3), Order::DropStores(3)], false));
        assert!(s.take_orders().is_none());
        for page in 0..5000 {
            s.order(Order::DropCode(page));
        }
        let o = s.take_orders().unwrap();
        assert!(o.all && o.list.is_empty());
    }

    #[test]
    fn a_processor_that_is_gone_is_left_alone() {
        let pending = Box::new(AtomicU32::new(0));
        let s = Shared::new(&*pending, true);
        s.poke();
        assert_eq!(pending.load(Ordering::Relaxed), 1);
        s.forget();
        drop(pending);
        s.poke();
    }
}
