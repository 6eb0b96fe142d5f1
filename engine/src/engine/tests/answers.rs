//! Answers equal their closed form, alone, together, chunked, pre-empted and from the cache.

use super::*;
use crate::request::SubmitError;

fn assert_answer(reader: &mut Reader, request: &GenerateRequest, max_len: usize) {
    let (tokens, reason) = closed_form(request, max_len);
    let answer = reader.read();
    assert_eq!(answer.tokens, tokens, "{request:?}");
    assert_eq!(answer.reason(), reason);
}

#[test]
fn a_prompt_is_answered() {
    let mut rig = Rig::new(small_config());
    let request = request(&[3, 1, 4, 1, 5], 20);
    let mut reader = rig.submit(request.clone());
    rig.run();
    assert_answer(&mut reader, &request, 64);
    assert_eq!(reader.answer.ticket(), None);
    rig.assert_clean();
}

#[test]
fn one_token_asked_is_one_token_given() {
    let mut rig = Rig::new(small_config());
    let request = request(&long_running(7), 1);
    let mut reader = rig.submit(request.clone());
    rig.run();
    assert_eq!(reader.read().tokens.len(), 1);
    assert_eq!(reader.answer.reason(), FinishReason::Length);
}

#[test]
fn a_long_prompt_is_read_in_pieces_with_and_without_the_option() {
    let prompt: Vec<TokenId> = (0..50).map(|n| 1 + n * 7 % 40).collect();
    for chunked in [false, true] {
        for bound in [1, 3, 16, 64] {
            let mut rig = Rig::new(EngineConfig {
                max_num_tokens: bound,
                enable_chunked_prefill: chunked,
                ..small_config()
            });
            let request = request(&prompt, 8);
            let mut reader = rig.submit(request.clone());
            let mut other = rig.submit(super::request(&[2, 2], 8));
            rig.run();
            assert_answer(&mut reader, &request, 64);
            assert_answer(&mut other, &super::request(&[2, 2], 8), 64);
            rig.assert_clean();
        }
    }
}

#[test]
fn somebody_who_writes_bounds_the_prompt_tokens_beside() {
    let mut rig = Rig::new(EngineConfig {
        prefill_tokens_beside_decode: 4,
        ..small_config()
    });
    let mut writer = rig.submit(request(&long_running(9), 30));
    rig.step();
    assert_eq!(writer.read().tokens.len(), 1);
    let prompt: Vec<TokenId> = (1..=16).collect();
    let mut reader = rig.submit(request(&prompt, 4));
    for turn in 1..=4 {
        assert_eq!(reader.read().tokens.len(), 0);
        rig.step();
        assert_eq!(writer.read().tokens.len(), 1 + turn);
    }
    assert_eq!(reader.read().tokens.len(), 1);
    let iterations = rig.handle.take_iterations();
    let last = &iterations[4].inflight_batching_stats;
    assert_eq!((last.num_ctx_tokens, last.num_gen_requests), (4, 1));
    assert_eq!(iterations[4].iter, 5);
    assert!(rig.handle.take_iterations().is_empty());
}

#[test]
fn a_prefix_is_computed_once_and_the_answers_stay_the_same() {
    let mut rig = Rig::new(small_config());
    let prompt: Vec<TokenId> = (1..=13).collect();
    let first = request(&prompt, 5);
    let mut reader = rig.submit(first.clone());
    rig.run();
    assert_answer(&mut reader, &first, 64);
    assert_eq!(reader.answer.costs().cached_tokens, 0);

    let mut longer = request(&[prompt.clone(), vec![20, 21]].concat(), 5);
    let mut again = rig.submit(longer.clone());
    rig.run();
    assert_answer(&mut again, &longer, 64);
    assert_eq!(rig.stats().prompt_tokens_cached_total, 12);
    assert_eq!(again.answer.costs().cached_tokens, 12);
    assert_eq!(again.answer.costs().blocks_reused, 3);

    longer.cache_salt = Some("another tenant".to_owned());
    let mut salted = rig.submit(longer.clone());
    rig.run();
    assert_answer(&mut salted, &longer, 64);
    assert_eq!(salted.answer.costs().cached_tokens, 0);
    rig.assert_clean();

    let events = rig.handle.take_kv_events();
    assert!(matches!(events[0].data, KvEventData::Created { .. }));
    assert!(matches!(
        &events[2].data,
        KvEventData::Stored { parent_hash: Some(_), blocks } if blocks[0].tokens.len() == 4
    ));
}

#[test]
fn reuse_can_be_switched_off() {
    let mut rig = Rig::new(EngineConfig {
        enable_block_reuse: false,
        ..small_config()
    });
    for _ in 0..2 {
        let request = request(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 3);
        let mut reader = rig.submit(request.clone());
        rig.run();
        assert_answer(&mut reader, &request, 64);
        assert_eq!(reader.answer.costs().cached_tokens, 0);
    }
    assert_eq!(rig.stats().blocks_cached, 0);
    assert!(rig.handle.take_kv_events().is_empty());
}

#[test]
fn the_youngest_gives_way_and_still_answers_rightly() {
    // Two answers of 40 tokens need 22 blocks; there are 16.
    let mut rig = Rig::new(EngineConfig {
        block_count: 16,
        ..small_config()
    });
    let requests: Vec<_> = (20..24).map(|n| request(&long_running(n), 40)).collect();
    let mut readers: Vec<_> = requests.iter().map(|r| rig.submit(r.clone())).collect();
    rig.run();
    for (reader, request) in readers.iter_mut().zip(&requests) {
        assert_answer(reader, request, 64);
    }
    assert!(rig.stats().preemptions_total > 0);
    rig.assert_clean();
}

#[test]
fn the_pool_bounds_an_answer_that_nothing_else_does() {
    let mut rig = Rig::new(EngineConfig {
        block_count: 3,
        max_seq_len: 1000,
        ..small_config()
    });
    let limits = rig.handle.limits();
    assert_eq!((limits.max_seq_len, limits.bounded_by_pool), (12, true));
    let request = request(&long_running(3), 40);
    let mut reader = rig.submit(request.clone());
    rig.run();
    assert_answer(&mut reader, &request, 12);
    assert_eq!(reader.answer.reason(), FinishReason::Length);
}

#[test]
fn prompt_logprobs_cover_the_prompt_in_bounded_pieces() {
    let mut rig = Rig::new(EngineConfig {
        max_num_tokens: 256,
        max_seq_len: 256,
        block_count: 80,
        ..small_config()
    });
    let prompt: Vec<TokenId> = (0..150).map(|n| 1 + n * 11 % 47).collect();
    let mut request = request(&prompt, 2);
    // The prefix is in the cache, and must not be used.
    rig.submit(request.clone());
    rig.run();
    request.sampling.prompt_logprobs = Some(1);
    request.sampling.logprobs = Some(0);
    let mut reader = rig.submit(request.clone());
    let mut widest = 0;
    while rig.step() {
        let iterations = rig.handle.take_iterations();
        let tokens = iterations
            .iter()
            .map(|i| i.inflight_batching_stats.num_ctx_tokens);
        widest = tokens.fold(widest, usize::max);
    }
    assert!((1..=64).contains(&widest), "{widest} rows at once");
    assert_answer(&mut reader, &request, 256);
    let answer = &reader.answer;
    assert_eq!(answer.costs().cached_tokens, 0);
    let list = answer.prompt_logprobs.as_ref().expect("asked for");
    assert_eq!(list.len(), 149);
    for (index, logprobs) in list.iter().enumerate() {
        let logits = logits_after(&prompt[..=index]);
        let expected = crate::sampler::prompt_logprobs(&logits, prompt[index + 1], 1);
        assert_eq!(Ok(logprobs), expected.as_ref());
    }
    assert!(answer.logprobs.iter().all(Option::is_some));
    rig.assert_clean();
}

#[test]
fn a_single_prompt_token_has_an_empty_list_of_logprobs() {
    let mut rig = Rig::new(small_config());
    let mut request = request(&[5], 2);
    request.sampling.prompt_logprobs = Some(0);
    let mut reader = rig.submit(request);
    rig.run();
    assert_eq!(reader.read().prompt_logprobs, Some(Vec::new()));
}

#[test]
fn the_queue_is_bounded_and_says_so() {
    let mut rig = Rig::with_capacity(small_config(), 2);
    let _first = rig.submit(request(&[1], 4));
    let _second = rig.submit(request(&[2], 4));
    let busy = rig.handle.submit(request(&[3], 4)).expect_err("full");
    assert_eq!(busy, SubmitError::Busy { queued: 2 });
    rig.step();
    assert_eq!(rig.handle.queued(), 0);
    let _third = rig.submit(request(&[3], 4));
}

#[test]
fn what_can_never_be_served_is_refused_with_both_numbers() {
    let rig = Rig::new(small_config());
    let refused = |request: GenerateRequest| match rig.handle.submit(request) {
        Err(SubmitError::Unservable(text)) => text,
        other => panic!("not refused: {other:?}"),
    };
    assert_eq!(
        refused(request(&[1; 64], 4)),
        "the prompt has 64 tokens and needs room for one more, but max_seq_len is 64"
    );
    assert!(rig.handle.submit(request(&[1; 63], 4)).is_ok());
    assert!(refused(request(&[], 4)).contains("no token"));
    assert!(refused(request(&[48], 4)).contains("token 48 is outside the vocabulary of 48"));
    assert!(refused(request(&[1], 0)).contains("max_tokens is 0"));
    let mut hot = request(&[1], 1);
    hot.sampling.temperature = f32::NAN;
    assert!(refused(hot).contains("temperature is NaN"));
    let small = Rig::new(EngineConfig {
        block_count: 2,
        ..small_config()
    });
    let Err(SubmitError::Unservable(text)) = small.handle.submit(request(&[1; 9], 4)) else {
        panic!("nine tokens do not fit two blocks of four");
    };
    assert!(text.contains("9 tokens") && text.contains("holds 8 (2 blocks of 4)"));
}

#[test]
fn a_client_who_goes_away_frees_everything_at_any_moment() {
    let prompt: Vec<TokenId> = (1..=30).collect();
    for turns in 0..12 {
        let mut rig = Rig::new(small_config());
        let stays = request(&[2, 3], 20);
        let mut reader = rig.submit(stays.clone());
        let mut leaver = rig.submit(request(&prompt, 30));
        for _ in 0..turns {
            rig.step();
        }
        leaver.drop_stream();
        rig.run();
        assert_answer(&mut reader, &stays, 64);
        assert_eq!(rig.stats().requests_cancelled_total, 1);
        rig.assert_clean();
    }
}

#[test]
fn a_cancel_by_number_is_confirmed() {
    let mut rig = Rig::new(small_config());
    let mut reader = rig.submit(request(&long_running(1), 40));
    rig.step();
    let id = reader.stream.as_ref().expect("open").id();
    rig.handle.cancel(id);
    rig.handle.cancel(crate::request::RequestId(999));
    rig.run();
    assert_eq!(reader.read().reason(), FinishReason::Cancelled);
    rig.assert_clean();
}

#[test]
fn broken_logits_fail_their_request_only() {
    let mut rig = Rig::new(small_config());
    let mut model = FakeModel::new();
    model.mishap = Some(fakes::Mishap::NanFor(9));
    model.steps_left = usize::MAX;
    let config = &rig.core.config;
    let shape = page_shape(&model, config);
    model
        .allocate_pages(shape, config.block_count)
        .expect("memory");
    rig.core.model = Box::new(model);
    let good = request(&[3, 4], 6);
    let mut bad = rig.submit(request(&[9, 4], 6));
    let mut reader = rig.submit(good.clone());
    rig.run();
    assert_answer(&mut reader, &good, 64);
    assert_eq!(
        bad.read().failure(),
        &RequestFailure::Engine("logit of token 3 is NaN".to_owned())
    );
    rig.assert_clean();
}
