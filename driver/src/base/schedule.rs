//! Points where a checker of schedules may let another thread go on: before a lock that the checker does not know, which nobody
//! holds across a point. Nothing in the program itself.

#[cfg(not(test))]
#[inline(always)]
pub(crate) fn point() {}

#[cfg(test)]
pub(crate) use checked::{checked, point};

#[cfg(test)]
mod checked {
    use std::cell::Cell;

    thread_local! {
        static CHECKED: Cell<bool> = const { Cell::new(false) };
    }

    /// Runs `check`, which gives the points of this thread to shuttle: it runs all of its threads on the one that calls it.
    pub(crate) fn checked(check: impl FnOnce()) {
        struct Unchecked;
        impl Drop for Unchecked {
            fn drop(&mut self) {
                CHECKED.set(false);
            }
        }
        let _unchecked = Unchecked;
        CHECKED.set(true);
        check();
    }

    pub(crate) fn point() {
        if CHECKED.get() {
            shuttle::thread::yield_now();
        }
    }
}
