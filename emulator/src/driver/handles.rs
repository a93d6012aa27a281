//! Handles: numbers that name objects, so that a wrong one is found and not followed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Call, status};

/// Objects of one kind by handle.
pub(crate) struct Table<T> {
    objects: HashMap<usize, T>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Table { objects: HashMap::new() }
    }
}

impl<T: Clone> Table<T> {
    /// Keeps an object; its handle is like no other, of any kind.
    pub fn insert(&mut self, object: T) -> usize {
        static NEXT: AtomicUsize = AtomicUsize::new(0x1000);
        let handle = NEXT.fetch_add(0x10, Ordering::Relaxed);
        self.objects.insert(handle, object);
        handle
    }

    /// All objects and their handles.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &T)> {
        self.objects.iter().map(|(&handle, object)| (handle, object))
    }

    pub fn get(&self, handle: usize) -> Call<T> {
        self.objects.get(&handle).cloned().ok_or(status::INVALID_HANDLE)
    }

    pub fn remove(&mut self, handle: usize) -> Call<T> {
        self.objects.remove(&handle).ok_or(status::INVALID_HANDLE)
    }
}
