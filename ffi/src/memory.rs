//! The caller's memory: every raw pointer is checked here for what can be checked, and read and written here.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::MaybeUninit;

use libc::iovec;
use tidegate_driver::bytes::{Failure, Result};

use crate::abi::{tg_info, tg_options};

/// Longest structure that a program may have; none of ours is near, and no number read by mistake makes us look far.
const STRUCTURE_BYTES_MAX: usize = 4096;
/// Most parts of one write, as of writev().
const PARTS_MAX: usize = 1024;

fn null(name: &str) -> Failure {
    Failure::new(libc::EFAULT, format!("'{name}' is NULL"))
}

fn invalid(what: impl Into<String>) -> Failure {
    Failure::new(libc::EINVAL, what)
}

/// Where a result goes, or a value that the call changes. It need not be aligned.
#[derive(Clone, Copy)]
pub struct Out<T>(*mut T);

impl<T: Copy> Out<T> {
    /// One that may be NULL: then the result goes nowhere.
    ///
    /// # Safety
    /// `to` is NULL, or may be read and written while this exists.
    pub unsafe fn optional(to: *mut T) -> Out<T> {
        Out(to)
    }

    /// One that must not be NULL.
    ///
    /// # Safety
    /// As for `optional`; and it holds a value if that is asked for.
    pub unsafe fn required(to: *mut T, name: &str) -> Result<Out<T>> {
        if to.is_null() { Err(null(name)) } else { Ok(Out(to)) }
    }

    /// Puts the result there.
    pub fn set(&self, value: T) {
        if !self.0.is_null() {
            // SAFETY: not NULL, so by the contract of the constructors it may be written.
            unsafe { self.0.write_unaligned(value) }
        }
    }

    /// What is there; of a required one.
    pub fn get(&self) -> T {
        // SAFETY: by the contract of `required` it is not NULL and holds a value.
        unsafe { self.0.read_unaligned() }
    }
}

/// `count` values to read, one by one. They need not be aligned.
#[derive(Clone, Copy)]
pub struct Array<T> {
    first: *const T,
    count: usize,
}

impl<T: Copy> Array<T> {
    /// Neither NULL nor empty, nor longer than memory can be.
    ///
    /// # Safety
    /// `first` is NULL or has `count` values, which stay while this exists.
    pub unsafe fn new(first: *const T, count: usize, name: &str) -> Result<Array<T>> {
        fits(first.cast(), count, size_of::<T>(), name)?;
        Ok(Array { first, count })
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Copies one.
    pub fn get(&self, at: usize) -> T {
        assert!(at < self.count);
        // SAFETY: within the values that there are by the contract of `new`.
        unsafe { self.first.add(at).read_unaligned() }
    }
}

/// Room for `count` values.
pub struct Room<T> {
    first: *mut T,
    count: usize,
}

impl<T: Copy> Room<T> {
    /// Neither NULL nor empty, nor longer than memory can be.
    ///
    /// # Safety
    /// `first` is NULL or has room for `count` values while this exists.
    pub unsafe fn new(first: *mut T, count: usize, name: &str) -> Result<Room<T>> {
        fits(first.cast_const().cast(), count, size_of::<T>(), name)?;
        Ok(Room { first, count })
    }

    /// For how many.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Puts one there.
    pub fn put(&mut self, at: usize, value: T) {
        assert!(at < self.count);
        // SAFETY: within the room that there is by the contract of `new`.
        unsafe { self.first.add(at).write_unaligned(value) }
    }
}

fn fits(first: *const c_void, count: usize, bytes_each: usize, name: &str) -> Result<()> {
    if first.is_null() {
        return Err(null(name));
    }
    if count == 0 {
        return Err(invalid(format!("there are none of '{name}'")));
    }
    match count.checked_mul(bytes_each) {
        Some(bytes) if isize::try_from(bytes).is_ok() && first.addr().checked_add(bytes).is_some() => Ok(()),
        _ => Err(invalid(format!("{count} of '{name}' is more than memory can hold"))),
    }
}

/// Bytes that the caller gives: at least one.
///
/// # Safety
/// `data` is NULL or has `length` bytes, which stay as they are for `'a`.
pub unsafe fn bytes<'a>(data: *const c_void, length: usize, name: &str) -> Result<&'a [u8]> {
    fits(data, length, 1, name)?;
    // SAFETY: not NULL and no longer than a slice can be; there by this function's contract.
    Ok(unsafe { std::slice::from_raw_parts(data.cast(), length) })
}

/// Room for bytes that the caller gets: at least one.
///
/// # Safety
/// `data` is NULL or has room for `length` bytes, which nobody else uses for `'a`.
pub unsafe fn bytes_mut<'a>(data: *mut c_void, length: usize, name: &str) -> Result<&'a mut [u8]> {
    fits(data, length, 1, name)?;
    // SAFETY: not NULL and no longer than a slice can be; there by this function's contract.
    Ok(unsafe { std::slice::from_raw_parts_mut(data.cast(), length) })
}

/// The parts of a write, without the empty ones; at least one byte.
///
/// # Safety
/// `parts` is NULL or has `count` parts, and each is NULL or has its bytes, which stay as they are for `'a`.
pub unsafe fn parts<'a>(parts: *const iovec, count: c_int) -> Result<Vec<&'a [u8]>> {
    let count = usize::try_from(count).unwrap_or(0);
    if count > PARTS_MAX {
        return Err(invalid(format!("{count} parts: a write has at most {PARTS_MAX}")));
    }
    let mut slices = Vec::with_capacity(count);
    let mut length = 0usize;
    // SAFETY: by this function's contract.
    let parts = unsafe { Array::new(parts, count, "parts")? };
    for part in (0..count).map(|at| parts.get(at)).filter(|part| part.iov_len > 0) {
        // SAFETY: by this function's contract.
        slices.push(unsafe { bytes(part.iov_base, part.iov_len, "iov_base")? });
        length =
            length.checked_add(part.iov_len).ok_or_else(|| invalid("the parts are longer than memory"))?;
    }
    if length == 0 { Err(invalid("the parts have no bytes")) } else { Ok(slices) }
}

/// A string that the caller gives.
///
/// # Safety
/// `text` is NULL or ends with a zero.
pub unsafe fn text(text: *const c_char, name: &str) -> Result<String> {
    if text.is_null() {
        return Err(null(name));
    }
    // SAFETY: not NULL; it ends by this function's contract.
    let text = unsafe { CStr::from_ptr(text) };
    let text = text.to_str().map_err(|_| invalid(format!("'{name}' is not UTF-8")))?;
    if text.is_empty() { Err(invalid(format!("'{name}' is empty"))) } else { Ok(text.to_owned()) }
}

/// Size of a structure that begins with it, which may be shorter or longer than ours: not so that a field is cut.
///
/// # Safety
/// `structure` is NULL or begins with a readable u32.
unsafe fn size_field(structure: *const c_void, name: &str) -> Result<usize> {
    if structure.is_null() {
        return Err(null(name));
    }
    // SAFETY: not NULL; there by this function's contract.
    let size = unsafe { structure.cast::<u32>().read_unaligned() } as usize;
    if (8..=STRUCTURE_BYTES_MAX).contains(&size) && size.is_multiple_of(8) {
        return Ok(size);
    }
    Err(invalid(format!("{name}->size is {size}: set it to sizeof(struct tg_{name})")))
}

/// The caller's options; those it does not know are zero.
///
/// # Safety
/// `options` is NULL or has as many bytes as its first field says.
pub unsafe fn options(options: *const tg_options) -> Result<tg_options> {
    // SAFETY: all zeroes are valid: numbers, no callback, NULL.
    let mut ours = unsafe { MaybeUninit::<tg_options>::zeroed().assume_init() };
    if options.is_null() {
        return Ok(ours);
    }
    // SAFETY: by this function's contract.
    let theirs = unsafe { bytes_of(options.cast(), "options")? };
    let known = theirs.len().min(size_of::<tg_options>());
    // SAFETY: both have that many bytes. They are a valid structure, whatever they are: a callback is any address.
    unsafe { std::ptr::copy_nonoverlapping(theirs.as_ptr(), (&raw mut ours).cast::<u8>(), known) };
    if theirs[known..].iter().any(|&byte| byte != 0) {
        return Err(invalid(
            "options has fields that this version of the library does not know, and they are not 0",
        ));
    }
    Ok(ours)
}

/// # Safety
/// `structure` is NULL or has as many bytes as its first field says.
unsafe fn bytes_of<'a>(structure: *const c_void, name: &str) -> Result<&'a [u8]> {
    // SAFETY: by this function's contract.
    unsafe {
        let size = size_field(structure, name)?;
        bytes(structure, size, name)
    }
}

/// Fills the caller's structure, as much of it as it knows; what only it knows becomes zero.
///
/// # Safety
/// `info` is NULL or has as many bytes as its first field says.
pub unsafe fn put_info(info: *mut tg_info, ours: &tg_info) -> Result<()> {
    // SAFETY: by this function's contract.
    let size = unsafe { size_field(info.cast_const().cast(), "info")? };
    let known = size.min(size_of::<tg_info>());
    let mut ours = *ours;
    ours.size = known as u32;
    // SAFETY: the caller's structure has `size` bytes, of which ours fills `known`; tg_info has no padding.
    unsafe {
        let theirs = info.cast::<u8>();
        theirs.write_bytes(0, size);
        std::ptr::copy_nonoverlapping((&raw const ours).cast::<u8>(), theirs, known);
    }
    Ok(())
}
