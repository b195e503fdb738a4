//! One virtual processor among others: exclusive sections, the orders that the
//! others leave, pages of code that several have translated.
use crate::gate::Gate;
use crate::shared::{Order, Orders};
use crate::vcpu::Vcpu;
use bunshin_core::clock;
use std::sync::Arc;

impl Vcpu {
    /// This processor's bit in the words of `Pages`.
    pub fn me(&self) -> u64 {
        1 << self.index
    }

    /// Come in through the gate; false if it was in.
    pub fn come_in(&mut self) -> bool {
        if std::mem::replace(&mut self.inside, true) {
            return false;
        }
        if !self.crew.single() {
            self.crew.gate.come_in(&*self.shared);
        }
        self.obey();
        true
    }

    /// Be out until the next [`Vcpu::come_in`].
    pub fn go_out(&mut self) {
        self.inside = false;
        if !self.crew.single() {
            self.crew.gate.go_out(&*self.shared);
        }
    }

    /// Be out until poked, or until `deadline` (see `Shared::sleep`).
    pub fn sleep(&mut self, deadline: Option<u64>) {
        let started = clock::rdtsc();
        self.go_out();
        self.shared.sleep(deadline);
        self.come_in();
        self.times.halted += clock::rdtsc() - started;
    }

    /// Act from outside of `run`, with the gate's leave.
    pub fn visit<R>(&mut self, f: impl FnOnce(&mut Self) -> R) -> R {
        let came = self.come_in();
        let r = f(self);
        if came {
            self.go_out();
        }
        r
    }

    /// At a safe point: let sections that are wanted go first, then carry out orders.
    pub fn give_way(&mut self) {
        if !self.crew.single() && self.crew.gate.wanted() {
            self.go_out();
            self.come_in();
        } else {
            self.obey();
        }
    }

    /// Act while every other processor stands still. Whatever this one knew about
    /// its translations and store tags may be different inside. Not for helpers
    /// that run inside translated code.
    pub fn exclusively<R>(&mut self, f: impl FnOnce(&mut Self) -> R) -> R {
        if self.crew.single() || self.exclusive {
            return f(self);
        }
        debug_assert!(!self.in_code, "an exclusive section inside translated code");
        let (crew, shared) = (self.crew.clone(), self.shared.clone());
        let gate: &Gate = &crew.gate;
        let section = gate.begin(&*shared, crew.those(!self.me()));
        self.counters.exclusive_sections += 1;
        self.obey();
        self.exclusive = true;
        let r = f(self);
        self.exclusive = false;
        drop(section);
        r
    }

    /// Leave an order with the others in `who`. Inside a section they carry it out
    /// before they run again.
    fn tell(&self, who: u64, order: Order) {
        for other in self.crew.those(who & !self.me()) {
            other.order(order);
        }
    }

    /// Carry out what others have ordered.
    pub fn obey(&mut self) {
        let Some(Orders { list, all }) = self.shared.take_orders() else { return };
        if all {
            self.flush_code();
            // The words of the pages go on saying that there may be some.
            for r in &mut self.regions.all {
                r.flush();
            }
            self.cpu_mut().kuser = 0;
        }
        for order in list {
            match order {
                Order::DropCode(page) => self.drop_page(page),
                Order::DropStores(page) => self.drop_store_tags(page),
            }
        }
    }

    /// Get ready to translate from `page`: from now on stores to it are heard by
    /// this processor, its own and everybody else's. True if others had to stand
    /// still for that: what was read before may have changed.
    pub fn claim_code(&mut self, page: usize) -> bool {
        let pages: Arc<_> = self.phys.pages.clone();
        let me = self.me();
        if pages.code(page) & me != 0 {
            return false;
        }
        let others = pages.announce_code(page, me);
        self.drop_store_tags(page);
        if others == 0 {
            return false;
        }
        self.exclusively(|v| {
            // An order may have taken the announcement back meanwhile.
            let others = v.phys.pages.announce_code(page, me);
            v.tell(others, Order::DropStores(page));
            v.phys.pages.forget_stores(page, others);
        });
        true
    }

    /// Let others forget their translations of `page`, which changes. Inside an
    /// exclusive section.
    pub fn drop_others_code(&mut self, page: usize) {
        let others = self.phys.pages.code(page) & !self.me();
        if others != 0 {
            self.tell(others, Order::DropCode(page));
            self.phys.pages.forget_code(page, others);
        }
    }
}
