//! What the processors of one machine hold of each page of guest RAM.
//!
//! Two words of one bit a processor, for each page:
//!
//! ```text
//! code    the processor has translations of the page, or is about to read it for one
//! stores  the processor may have a store tag for the page, or a store under way to it
//! ```
//!
//! A store must not pass another processor's translation unheard. Who is about to
//! store announces itself in `stores`, then looks at `code`; who is about to translate
//! announces itself in `code`, then looks at `stores`. Both do so with sequential
//! consistency, so at least one of two that race sees the other, and calls an
//! exclusive section (`gate.rs`) to sort it out. A bit in `stores` stays set until
//! such a section: it says may.
use std::alloc::{alloc_zeroed, handle_alloc_error, Layout};
use std::sync::atomic::{AtomicU64, Ordering};

/// Most processors that one word has bits for.
pub const MAX_CPUS: u32 = 64;

/// Shared by the processors of one machine. Pages are named by their index
/// (`Phys::page`).
pub struct Pages(Box<[Page]>);

struct Page {
    code: AtomicU64,
    stores: AtomicU64,
}

impl Pages {
    /// The words come as zero pages that the host gives when they are first touched,
    /// however much memory the guest has.
    pub fn new(count: usize) -> Self {
        let Ok(layout) = Layout::array::<Page>(count) else { panic!("{count} pages") };
        if layout.size() == 0 {
            return Self(Box::new([]));
        }
        // SAFETY: the layout is not empty, and of the slice that the box frees; zeroes
        // are a Page.
        unsafe {
            let pages = alloc_zeroed(layout).cast::<Page>();
            if pages.is_null() {
                handle_alloc_error(layout);
            }
            Self(Box::from_raw(std::ptr::slice_from_raw_parts_mut(pages, count)))
        }
    }

    /// Who has translations of `page`.
    #[inline]
    pub fn code(&self, page: usize) -> u64 {
        self.0[page].code.load(Ordering::SeqCst)
    }

    /// Who may have a store tag for `page`.
    #[inline]
    pub fn stores(&self, page: usize) -> u64 {
        self.0[page].stores.load(Ordering::SeqCst)
    }

    /// `me` is about to translate from `page`; the other processors that may store
    /// to it unheard.
    pub fn announce_code(&self, page: usize, me: u64) -> u64 {
        self.0[page].code.fetch_or(me, Ordering::SeqCst);
        self.stores(page) & !me
    }

    /// `me` is about to store to `page`; who must hear of it, `me` too. If that is
    /// nobody else, it may store there until its next safe point.
    #[inline]
    pub fn announce_store(&self, page: usize, me: u64) -> u64 {
        // Only a section takes the bit away, and none begins before that safe point.
        if self.0[page].stores.load(Ordering::Relaxed) & me == 0 {
            self.0[page].stores.fetch_or(me, Ordering::SeqCst);
        }
        self.code(page)
    }

    /// Nobody of `who` has translations of `page` any more.
    pub fn forget_code(&self, page: usize, who: u64) {
        self.0[page].code.fetch_and(!who, Ordering::SeqCst);
    }

    /// Nobody of `who` has a store tag for `page` any more.
    pub fn forget_stores(&self, page: usize, who: u64) {
        self.0[page].stores.fetch_and(!who, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_announces_second_sees_the_first() {
        let p = Pages::new(3);
        assert_eq!(p.announce_store(1, 1), 0);
        assert_eq!(p.announce_code(1, 2), 1);
        assert_eq!(p.announce_store(1, 1), 2);
        assert_eq!((p.code(0), p.stores(0), p.code(2), p.stores(2)), (0, 0, 0, 0));
        p.forget_stores(1, 1);
        assert_eq!(p.announce_code(1, 4), 0);
        p.forget_code(1, 6);
        assert_eq!(p.code(1), 0);
    }

    #[test]
    fn racing_announcements_never_miss_each_other() {
        let pages = Pages::new(1);
        for _ in 0..2000 {
            let (stored, translated) = std::thread::scope(|s| {
                let a = s.spawn(|| pages.announce_store(0, 1) & 2);
                let b = s.spawn(|| pages.announce_code(0, 2));
                (a.join().unwrap(), b.join().unwrap())
            });
            assert!(stored != 0 || translated != 0);
            pages.forget_code(0, 3);
            pages.forget_stores(0, 3);
        }
    }
}
