//! A fetch's pages on their ways to a transport of this process and back.

use std::sync::Arc;

use super::*;
use crate::page::{KvDtype, PageShape};
use crate::transport::memory;

fn transport() -> Arc<dyn Transport> {
    memory::start_for_tests(Arc::new(drop))
}

/// Pages that tell which one they are, for the blocks from 10 on.
fn stock(count: u16) -> Stock {
    let shape = PageShape {
        layers: 1,
        kv_heads: 1,
        tokens_per_block: 1,
        head_dim: 1,
        dtype: KvDtype::F32,
    };
    let pages = (0..count).map(|index| {
        let mut page = Page::zeroed(shape);
        page.as_f32_mut().fill(f32::from(index));
        (10 + BlockId::from(index), page)
    });
    Stock::new(pages.collect())
}

/// Each block has its page.
fn assert_whole(stock: Stock, count: u16) {
    let pages = stock.into_pages();
    let expected = (10..).take(usize::from(count));
    assert!(pages.blocks.iter().copied().eq(expected));
    for (index, page) in (0..count).zip(&pages.pages) {
        let words = [f32::from(index); 2];
        assert!(page.as_f32().iter().eq(&words), "page {index}");
    }
    assert_eq!(pages.len(), usize::from(count));
}

#[test]
fn what_was_sealed_comes_back_as_one_list() {
    let transport = transport();
    let mut stock = stock(5);
    stock.register(&*transport).unwrap();
    assert!(stock.are_registered(0..5) && !stock.are_registered(3..6));
    assert!(stock.seal(1..4, &*transport));
    assert!(!stock.seal(3..5, &*transport), "one of them is sealed");
    assert!(stock.are_registered(4..5) && !stock.are_registered(3..5));
    assert!(stock.seal(0..1, &*transport) && stock.seal(4..5, &*transport));
    assert_eq!((stock.verified(), stock.len()), (5, 5));
    assert!(stock.recall(&*transport).is_empty());
    assert_whole(stock, 5);
}

#[test]
fn what_is_checked_comes_back_one_by_one() {
    let transport = transport();
    let mut stock = stock(4);
    stock.register(&*transport).unwrap();
    assert!(stock.seal(0..2, &*transport));
    let (region, page) = stock.check(3, &*transport).unwrap();
    assert_eq!(Some(region), stock.region(3));
    assert!(stock.check(3, &*transport).is_none(), "it is here");
    stock.put_verified(3, page);
    assert_eq!(stock.verified(), 3);
    // One that is being checked while the others are called back is waited for.
    let (_, late) = stock.check(2, &*transport).unwrap();
    assert_eq!(stock.recall(&*transport), [2]);
    assert!(stock.waits());
    assert_eq!(stock.verified(), 0);
    stock.put(2, late);
    assert!(!stock.waits());
    // All are here again, and may go another way.
    stock.register(&*transport).unwrap();
    assert!(stock.recall(&*transport).is_empty());
    assert_whole(stock, 4);
}

#[test]
fn what_a_transport_does_not_take_stays_and_nothing_is_nothing() {
    let transport = transport();
    transport.close();
    let mut refused = stock(3);
    assert!(refused.register(&*transport).is_err());
    assert!(refused.recall(&*transport).is_empty());
    assert_whole(refused, 3);
    let mut none = stock(0);
    none.register(&*self::transport()).unwrap();
    assert!(none.recall(&*transport).is_empty());
    assert_whole(none, 0);
}
