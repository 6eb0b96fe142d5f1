//! Pages out of one grid and into another: what was read here is gone on with there.

use std::sync::Arc;

use super::*;
use crate::backend::{BlockId, TokenId};
use crate::model::Model;
use crate::model::load::{load, page_shape};
use crate::model::tests::Session;
use crate::page::Page;

/// 80 tokens are two full blocks and a half.
const PROMPT_LEN: u32 = 80;
const PROMPT_BLOCKS: usize = 3;
/// As for the golden answers: grids sum in different orders.
const TOLERANCE: f32 = 1e-3;

struct Side {
    session: Session,
    followers: Option<Followers>,
}

impl Side {
    fn start(tensor: u32, pipeline: u32) -> Self {
        let instance = Instance::tiny("qwen2", tensor, pipeline);
        let options = instance.options.clone();
        if Grid::of(&options) == Grid::ALONE {
            let model = instance.model.to_str().expect("UTF-8").to_owned();
            let loaded = load(&model, &options, None, CpuBackend::new(Some(1)), &|_| ());
            return Self {
                session: Session::new(loaded.expect("it loads"), &options),
                followers: None,
            };
        }
        let (led, followers) = instance.start();
        Self {
            session: Session::new(led.expect("it loads").loaded, &options),
            followers: Some(followers),
        }
    }

    fn model(&mut self) -> &mut dyn Model {
        self.session.model.as_mut()
    }

    fn share(&mut self) -> Vec<Arc<Page>> {
        let blocks = self.session.blocks(PROMPT_BLOCKS);
        self.model().share_pages(&blocks).expect("nobody is lost")
    }

    fn take(&mut self, pages: &[Arc<Page>]) {
        let blocks = self.session.blocks(PROMPT_BLOCKS);
        let lent = blocks.iter().zip(pages).map(|(&block, from)| {
            let mut page = self.model().lend_page(block);
            page.as_bytes_mut().copy_from_slice(from.as_bytes());
            (block, page)
        });
        let lent: Vec<(BlockId, Page)> = lent.collect();
        for &block in &blocks {
            assert!(!self.model().page_is_unshared(block), "a lent page is away");
        }
        self.model().return_pages(lent).expect("nobody is lost");
        assert!(self.model().page_is_unshared(blocks[0]));
    }

    fn end(self) {
        drop(self.session);
        if let Some(followers) = self.followers {
            followers.join_well();
        }
    }
}

fn prompt() -> Vec<TokenId> {
    (0..PROMPT_LEN).map(|at| (at * 31 + 7) % 250).collect()
}

fn check(from: (u32, u32), to: (u32, u32)) {
    let (mut context, mut generation) = (Side::start(from.0, from.1), Side::start(to.0, to.1));
    assert!(context.session.feed(&prompt(), 80).is_empty());
    let expected_shape = page_shape(context.model().shape(), &options(1, 1));
    let pages = context.share();
    assert_eq!(
        *pages[0].shape(),
        expected_shape,
        "whole pages go over the wire"
    );
    assert!(
        pages
            .iter()
            .all(|page| page.as_bytes().iter().any(|&byte| byte != 0))
    );
    generation.take(&pages);
    let arrived = generation.share();
    for (sent, arrived) in pages.iter().zip(&arrived) {
        assert!(sent.as_bytes() == arrived.as_bytes(), "{from:?} to {to:?}");
    }
    drop((pages, arrived));
    generation.session.resume(PROMPT_LEN as usize);
    let rows = |side: &mut Side| side.session.feed(&[9, 10, 11], 0).concat();
    let (theirs, ours) = (rows(&mut generation), rows(&mut context));
    for (index, (theirs, ours)) in theirs.iter().zip(&ours).enumerate() {
        assert!(
            (theirs - ours).abs() < TOLERANCE,
            "{from:?} to {to:?}, logit {index}: {theirs} {ours}"
        );
    }
    context.end();
    generation.end();
}

#[test]
fn two_tensor_ranks_hand_over_to_one_rank_and_back() {
    check((2, 1), (1, 1));
    check((1, 1), (2, 1));
}

#[test]
fn stages_hand_over_to_tensor_ranks_and_back() {
    check((1, 2), (2, 1));
    check((2, 1), (1, 2));
}

#[test]
fn more_ranks_hand_over_to_fewer_and_back_with_repeated_heads_too() {
    check((4, 1), (2, 1));
    check((2, 1), (8, 1));
    check((8, 1), (2, 2));
    check((2, 2), (1, 3));
}

#[test]
fn a_page_that_is_read_is_gathered_once_until_it_is_written() {
    let mut side = Side::start(2, 1);
    side.session.feed(&prompt(), 80);
    let (first, again) = (side.share(), side.share());
    for (first, again) in first.iter().zip(&again) {
        assert!(Arc::ptr_eq(first, again));
    }
    // The third block has room for more; the others are full.
    side.session.feed(&[1], 1);
    let later = side.share();
    assert!(Arc::ptr_eq(&first[1], &later[1]));
    assert!(!Arc::ptr_eq(&first[2], &later[2]));
    assert!(first[2].as_bytes() != later[2].as_bytes());
    drop((first, again, later));
    assert_eq!(side.share().len(), PROMPT_BLOCKS);
    side.end();
}
