//! Copies between an operation's memory and a buffer.
#![expect(unsafe_code, reason = "operations name parts of the arena's mapping")]

use tidegate_driver::io::Memory;

/// The bytes of a write.
pub fn bytes(memory: &Memory) -> Vec<u8> {
    match memory {
        Memory::None | Memory::Client { .. } => Vec::new(),
        Memory::Owned(buf) => buf.to_vec(),
        Memory::Shared { region, offset, len } => {
            assert!(offset + len <= region.len_bytes());
            // SAFETY: in bounds; the submitter guarantees that nobody writes there, and there is one thread.
            unsafe { std::slice::from_raw_parts(region.base().add(*offset), *len) }.to_vec()
        }
    }
}

/// Fills the memory of a read.
pub fn fill(memory: &mut Memory, data: &[u8]) {
    match memory {
        Memory::None => assert!(data.is_empty()),
        Memory::Client { .. } => panic!("a client's memory is filled when the read ends"),
        Memory::Owned(buf) => buf.copy_from_slice(data),
        Memory::Shared { region, offset, len } => {
            assert!(*offset + *len <= region.len_bytes() && *len == data.len());
            // SAFETY: in bounds; the submitter guarantees that nobody uses the part, and there is one thread.
            unsafe {
                std::ptr::copy_nonoverlapping(data.as_ptr(), region.base().add(*offset), data.len());
            }
        }
    }
}
