//! Numbered places for things in flight.

/// A vector with holes: what is put in gets the lowest free number and keeps it.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    places: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Slab<T> {
    pub(crate) fn new() -> Self {
        Slab {
            places: Vec::new(),
            free: Vec::new(),
        }
    }

    pub(crate) fn insert(&mut self, value: T) -> usize {
        match self.free.pop() {
            Some(place) => {
                if let Some(hole) = self.places.get_mut(place) {
                    *hole = Some(value);
                }
                place
            }
            None => {
                self.places.push(Some(value));
                self.places.len() - 1
            }
        }
    }

    pub(crate) fn get_mut(&mut self, place: usize) -> Option<&mut T> {
        self.places.get_mut(place)?.as_mut()
    }

    pub(crate) fn remove(&mut self, place: usize) -> Option<T> {
        let value = self.places.get_mut(place)?.take()?;
        self.free.push(place);
        Some(value)
    }

    /// The numbers in use.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = usize> + '_ {
        self.places
            .iter()
            .zip(0..)
            .filter(|(place, _)| place.is_some())
            .map(|(_, number)| number)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.places.len() == self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_reused_and_never_shared() {
        let mut slab = Slab::new();
        let (a, b) = (slab.insert('a'), slab.insert('b'));
        assert_ne!(a, b);
        assert_eq!(slab.remove(a), Some('a'));
        assert_eq!(slab.remove(a), None);
        assert_eq!(slab.insert('c'), a);
        assert_eq!(slab.get_mut(b), Some(&mut 'b'));
        assert!(!slab.is_empty());
        assert_eq!((slab.remove(a), slab.remove(b)), (Some('c'), Some('b')));
        assert!(slab.is_empty());
    }
}
