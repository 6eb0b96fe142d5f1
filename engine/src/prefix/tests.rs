//! The tree of cached blocks: what is found, what is not, and what routers are told.

use super::*;

fn cache() -> PrefixCache {
    PrefixCache::new(EventLog::new(true, 8))
}

#[test]
fn a_block_is_found_under_its_own_parent_only() {
    let mut cache = cache();
    cache.insert(Parent::Root(None), &[1, 2], 0);
    cache.insert(Parent::Block(0), &[3, 4], 1);
    cache.insert(Parent::Root(None), &[3, 4], 2);
    assert_eq!(cache.find(Parent::Block(0), &[3, 4]), Some(1));
    assert_eq!(cache.find(Parent::Root(None), &[3, 4]), Some(2));
    assert_eq!(cache.find(Parent::Block(2), &[3, 4]), None);
    assert_eq!(cache.find(Parent::Block(0), &[3, 5]), None);
}

#[test]
fn tenants_do_not_see_each_other() {
    let mut cache = cache();
    let a: Arc<str> = "a".into();
    let b: Arc<str> = "b".into();
    cache.insert(Parent::Root(Some(&a)), &[1], 0);
    assert_eq!(cache.find(Parent::Root(Some(&a)), &[1]), Some(0));
    assert_eq!(cache.find(Parent::Root(Some(&b)), &[1]), None);
    assert_eq!(cache.find(Parent::Root(None), &[1]), None);
}

#[test]
fn equal_hashes_do_not_make_equal_blocks() {
    let mut cache = cache();
    cache.insert(Parent::Root(None), &[1, 2], 0);
    let hash = cache.nodes[&0].hash;
    // A forged candidate in the bucket that other tokens hash to.
    let other = cache.hash(Parent::Root(None), &[9, 9]);
    assert_ne!(hash, other);
    cache.by_hash.entry(other).or_default().push(0);
    assert_eq!(cache.find(Parent::Root(None), &[9, 9]), None);
}

#[test]
fn removing_a_leaf_makes_its_parent_a_leaf_and_its_place_free() {
    let mut cache = cache();
    cache.insert(Parent::Root(None), &[1], 0);
    cache.insert(Parent::Block(0), &[2], 1);
    assert!(!cache.is_leaf(0));
    cache.remove(1);
    assert!(cache.is_leaf(0));
    assert_eq!(cache.find(Parent::Block(0), &[2]), None);
    cache.insert(Parent::Block(0), &[2], 5);
    assert_eq!(cache.find(Parent::Block(0), &[2]), Some(5));
}

#[test]
fn events_name_the_parent_and_are_numbered() {
    let mut cache = cache();
    cache.insert(Parent::Root(None), &[1, 2, 3, 4], 0);
    cache.insert(Parent::Block(0), &[5, 6, 7, 8], 1);
    cache.remove(1);
    let events = serde_json::to_value(cache.take_events()).expect("serialisable");
    assert_eq!(
        events[0],
        serde_json::json!({"event_id": 0, "hash_algo": "v1_block_key",
            "data": {"type": "created", "num_blocks_per_cache_level": [8]}})
    );
    assert_eq!(events[1]["data"]["type"], "stored");
    assert_eq!(events[1]["data"]["parent_hash"], serde_json::Value::Null);
    assert_eq!(
        events[1]["data"]["blocks"][0]["block_hash"],
        924_206_229_973_855_u64
    );
    assert_eq!(
        events[1]["data"]["blocks"][0]["tokens"][3],
        serde_json::json!({"token_id": 4, "token_extra_id": 0})
    );
    assert_eq!(events[2]["data"]["parent_hash"], 924_206_229_973_855_u64);
    assert_eq!(
        events[3],
        serde_json::json!({"event_id": 3,
            "data": {"type": "removed", "block_hashes": [2_728_178_455_351_807_326_u64]}})
    );
    assert!(cache.take_events().is_empty());
}
