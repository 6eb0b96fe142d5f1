//! The stretches of a batch, joined where they touch and dealt out in windows: as few and as long descriptors as there
//! can be, and never so many under way that giving up takes long. Pure.

use std::iter::Peekable;

use super::library::Stretch;

/// Bytes of one request at most. Reading on the same host, the kernel copies this much in a few milliseconds, within
/// one call; over an adapter, it is long enough to hide what a request costs.
pub(super) const WINDOW_BYTES_MAX: usize = 16 << 20;

/// Stretches of one request at most: more of them are no faster, and all of them must be waited for.
pub(super) const WINDOW_STRETCHES_MAX: usize = 256;

/// Deals out stretches; each item is one request's.
#[derive(Debug)]
pub(super) struct Windows<I: Iterator<Item = Stretch>> {
    stretches: Peekable<I>,
    /// What of a stretch did not fit into the last window.
    left: Option<Stretch>,
}

impl<I: Iterator<Item = Stretch>> Windows<I> {
    pub(super) fn new(stretches: I) -> Self {
        Self {
            stretches: stretches.peekable(),
            left: None,
        }
    }

    /// The next stretch with those that follow it at once, on both sides, until it fills a window.
    fn joined(&mut self) -> Option<Stretch> {
        let mut joined = self.left.take().or_else(|| self.stretches.next())?;
        while joined.bytes < WINDOW_BYTES_MAX {
            let follows = |next: &Stretch| {
                next.remote == joined.remote + joined.bytes
                    && next.local == joined.local + joined.bytes
            };
            let Some(next) = self.stretches.next_if(follows) else {
                break;
            };
            joined.bytes += next.bytes;
        }
        Some(joined)
    }
}

impl<I: Iterator<Item = Stretch>> Iterator for Windows<I> {
    type Item = Vec<Stretch>;

    fn next(&mut self) -> Option<Vec<Stretch>> {
        let (mut window, mut room) = (Vec::new(), WINDOW_BYTES_MAX);
        while room > 0 && window.len() < WINDOW_STRETCHES_MAX {
            let Some(joined) = self.joined() else { break };
            let bytes = joined.bytes.min(room);
            window.push(Stretch { bytes, ..joined });
            room -= bytes;
            if bytes < joined.bytes {
                self.left = Some(Stretch {
                    remote: joined.remote + bytes,
                    local: joined.local + bytes,
                    bytes: joined.bytes - bytes,
                });
            }
        }
        (!window.is_empty()).then_some(window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stretch(remote: usize, local: usize, bytes: usize) -> Stretch {
        Stretch {
            remote,
            local,
            bytes,
        }
    }

    fn windows(stretches: impl IntoIterator<Item = Stretch>) -> Vec<Vec<Stretch>> {
        Windows::new(stretches.into_iter()).collect()
    }

    #[test]
    fn what_touches_on_both_sides_is_one() {
        let apart = [stretch(0, 0, 8), stretch(8, 9, 8), stretch(17, 17, 8)];
        assert_eq!(windows(apart), [apart.to_vec()]);
        let touching = (0..10_000).map(|index| stretch(index * 8, 100 + index * 8, 8));
        assert_eq!(windows(touching), [[stretch(0, 100, 80_000)]]);
        assert!(windows([]).is_empty());
    }

    #[test]
    fn a_long_one_is_cut_and_many_are_counted() {
        let long = windows([stretch(0, 0, 2 * WINDOW_BYTES_MAX + 5), stretch(7, 1, 3)]);
        let lengths: Vec<Vec<usize>> = long
            .iter()
            .map(|window| window.iter().map(|stretch| stretch.bytes).collect())
            .collect();
        let full = vec![WINDOW_BYTES_MAX];
        assert_eq!(lengths, [full.clone(), full, vec![5, 3]]);
        let many = (0..WINDOW_STRETCHES_MAX + 1).map(|index| stretch(index * 2, index, 1));
        let counts: Vec<_> = windows(many).iter().map(Vec::len).collect();
        assert_eq!(counts, [WINDOW_STRETCHES_MAX, 1]);
    }

    proptest! {
        #[test]
        fn every_byte_is_read_once_in_order(parts in prop::collection::vec((0_usize..3, 0_usize..3, 1_usize..(40 << 20)), 0..30)) {
            let (mut remote, mut local) = (0, 1 << 50);
            let stretches: Vec<_> = parts
                .into_iter()
                .map(|(remote_gap, local_gap, bytes)| {
                    let next = stretch(remote + remote_gap, local + local_gap, bytes);
                    (remote, local) = (next.remote + bytes, next.local + bytes);
                    next
                })
                .collect();
            let dealt = windows(stretches.iter().copied());
            for window in &dealt {
                prop_assert!(window.len() <= WINDOW_STRETCHES_MAX);
                prop_assert!(window.iter().map(|s| s.bytes).sum::<usize>() <= WINDOW_BYTES_MAX);
            }
            // Joining both the given and the dealt ones leaves the same.
            let whole = |of: Vec<Stretch>| of.into_iter().fold(Vec::new(), |mut all: Vec<Stretch>, next| {
                match all.last_mut() {
                    Some(last) if (last.remote + last.bytes, last.local + last.bytes) == (next.remote, next.local) => last.bytes += next.bytes,
                    _ => all.push(next),
                }
                all
            });
            prop_assert_eq!(whole(dealt.concat()), whole(stretches));
        }
    }
}
