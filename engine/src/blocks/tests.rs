//! The pool's books: handing out, sharing, evicting, lending, and never twice.

use std::collections::HashSet;

use super::*;

const ANY: Writable<'static> = &|_| true;

fn pool(blocks: usize) -> BlockPool {
    BlockPool::new(blocks, 2, true, false)
}

fn cached_chain(pool: &mut BlockPool, tokens: &[TokenId]) -> Vec<BlockId> {
    let mut blocks = pool.allocate(tokens.len() / 2, ANY).expect("room");
    for index in 0..blocks.len() {
        let parent = match index {
            0 => Parent::Root(None),
            _ => Parent::Block(blocks[index - 1]),
        };
        blocks[index] = pool.cache(parent, &tokens[index * 2..index * 2 + 2], blocks[index]);
    }
    blocks
}

#[test]
fn all_or_nothing_is_handed_out() {
    let mut pool = pool(3);
    let two = pool.allocate(2, ANY).expect("room");
    assert!(pool.allocate(2, ANY).is_none());
    assert_eq!(pool.available(), 1);
    pool.release(&two);
    let three = pool.allocate(3, ANY).expect("room");
    assert_eq!(three.iter().collect::<HashSet<_>>().len(), 3);
}

#[test]
fn a_page_with_a_reader_is_passed_over_and_said_so() {
    let mut pool = pool(2);
    assert!(pool.allocate(2, &|block| block != 0).is_none());
    assert!(pool.take_skipped_shared());
    assert!(!pool.take_skipped_shared());
    assert_eq!(pool.allocate(1, &|block| block != 0), Some(vec![1]));
    assert_eq!(pool.counts().free, 1);
}

#[test]
fn a_prefix_is_found_again_but_never_the_last_token() {
    let mut pool = pool(4);
    let blocks = cached_chain(&mut pool, &[1, 2, 3, 4]);
    pool.release(&blocks);
    assert_eq!(pool.counts().cached, 2);
    assert_eq!(pool.match_prefix(None, &[1, 2, 3, 4]), blocks[..1]);
    assert_eq!(pool.match_prefix(None, &[1, 2, 3, 4, 5]), blocks);
    assert!(pool.match_prefix(None, &[9, 2, 3, 4, 5]).is_empty());
    let counts = pool.counts();
    assert_eq!((counts.used, counts.cached), (2, 0));
}

#[test]
fn an_equal_block_is_held_once() {
    let mut pool = pool(4);
    let first = cached_chain(&mut pool, &[1, 2]);
    let second = cached_chain(&mut pool, &[1, 2]);
    assert_eq!(first, second);
    assert_eq!(pool.counts().used, 1);
    pool.release(&first);
    pool.release(&second);
    assert_eq!(pool.counts().used, 0);
}

#[test]
fn the_end_of_a_prefix_is_evicted_before_its_start() {
    let mut pool = pool(3);
    let chain = cached_chain(&mut pool, &[1, 2, 3, 4, 5, 6]);
    pool.release(&chain);
    pool.allocate(1, ANY).expect("evicts one");
    assert_eq!(pool.match_prefix(None, &[1, 2, 3, 4, 5, 6, 7]), chain[..2]);
}

#[test]
fn a_parent_stays_while_its_child_is_being_read() {
    let mut pool = pool(2);
    let chain = cached_chain(&mut pool, &[1, 2, 3, 4]);
    pool.release(&chain);
    let child = chain[1];
    assert!(pool.allocate(1, &|block| block != child).is_none());
    assert_eq!(pool.match_prefix(None, &[1, 2, 3, 4, 5]), chain);
}

#[test]
fn a_block_given_up_while_lent_waits_for_its_page() {
    let mut pool = pool(2);
    let blocks = pool.allocate(2, ANY).expect("room");
    pool.lend(&blocks);
    assert_eq!(pool.counts().lent, 2);
    pool.page_back(blocks[0]);
    pool.release(&blocks);
    let counts = pool.counts();
    assert_eq!((counts.lent, counts.quarantined, counts.free), (0, 1, 1));
    assert!(pool.allocate(2, ANY).is_none());
    pool.page_back(blocks[1]);
    assert_eq!(pool.counts().quarantined, 0);
    assert!(pool.allocate(2, ANY).is_some());
}

#[test]
fn a_lease_keeps_blocks_used() {
    let mut pool = pool(2);
    let blocks = cached_chain(&mut pool, &[1, 2]);
    pool.pin(&blocks);
    assert_eq!(pool.counts().pinned, 1);
    let shared = pool.match_prefix(None, &[1, 2, 3]);
    assert_eq!(shared, blocks);
    pool.unpin(&blocks);
    assert_eq!((pool.counts().pinned, pool.counts().used), (0, 1));
    pool.release(&shared);
    assert_eq!(pool.counts().used, 0);
}

#[test]
fn without_reuse_nothing_is_found() {
    let mut pool = BlockPool::new(2, 2, false, true);
    let blocks = cached_chain(&mut pool, &[1, 2]);
    pool.release(&blocks);
    assert!(pool.match_prefix(None, &[1, 2, 3]).is_empty());
    assert_eq!(pool.counts().free, 2);
    assert!(pool.take_events().is_empty());
}

#[test]
#[should_panic(expected = "released twice")]
fn a_block_cannot_be_released_twice() {
    let mut pool = pool(1);
    let blocks = pool.allocate(1, ANY).expect("room");
    pool.release(&blocks);
    pool.release(&blocks);
}
