//! Tests of the store: ends of entries, bounds, and who may change it.

use super::*;

fn lasting(value: &str) -> Entry {
    Entry {
        value: value.to_owned(),
        expires: None,
    }
}

fn until(end: Instant) -> Entry {
    Entry {
        value: "v".to_owned(),
        expires: Some(end),
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn what_has_expired_is_not_seen_before_any_sweep() {
    let now = Instant::now();
    let mut entries = Entries::default();
    assert_eq!(
        entries.set("a", until(now + 10 * SECOND), false, now),
        Ok(true)
    );
    assert_eq!(entries.set("ab", lasting(""), false, now), Ok(true));
    assert_eq!(entries.set("b", lasting("x"), false, now), Ok(true));
    let late = now + 9 * SECOND;
    assert_eq!(entries.set("a", lasting("w"), false, late), Ok(false));
    assert_eq!(entries.with_prefix("a", late).len(), 2);
    let end = now + 10 * SECOND;
    assert!(entries.live("a", end).is_none());
    let left: Vec<String> = entries.with_prefix("a", end).into_keys().collect();
    assert_eq!(left, ["ab"]);
    assert_eq!(entries.map.len(), 3, "nothing has swept");
    assert_eq!(entries.set("a", lasting("w"), false, end), Ok(true));
}

#[test]
fn bytes_are_counted_back_whatever_happens() {
    let now = Instant::now();
    let mut entries = Entries::default();
    for value in ["1", "22", "333"] {
        assert_eq!(entries.set("k", lasting(value), true, now), Ok(true));
        assert_eq!(entries.set("l", until(now + SECOND), true, now), Ok(true));
        entries.remove("l");
    }
    assert_eq!(entries.bytes, 4);
    assert_eq!(entries.set("l", until(now + SECOND), true, now), Ok(true));
    entries.sweep(now + SECOND);
    assert_eq!((entries.bytes, entries.map.len()), (4, 1));
    entries.remove("k");
    assert_eq!((entries.bytes, entries.map.len()), (0, 0));
}

#[test]
fn the_store_is_bounded_and_makes_room_from_what_has_expired() {
    let now = Instant::now();
    let mut entries = Entries::default();
    let long = entries.set(&"k".repeat(KEY_BYTES_MAX + 1), lasting(""), true, now);
    assert_eq!(
        long.unwrap_err().to_string(),
        "a key of 1025 bytes is longer than 1024"
    );
    let long = entries.set("k", lasting(&"v".repeat(VALUE_BYTES_MAX + 1)), true, now);
    assert_eq!(
        long.unwrap_err().to_string(),
        "a value of 65537 bytes is longer than 65536"
    );
    for index in 0..ENTRIES_MAX {
        let entry = until(now + SECOND);
        assert_eq!(entries.set(&index.to_string(), entry, false, now), Ok(true));
    }
    let full = entries.set("one more", lasting(""), false, now);
    assert!(matches!(
        full,
        Err(StoreError::Full {
            entries: ENTRIES_MAX,
            ..
        })
    ));
    assert_eq!(entries.set("0", until(now + SECOND), true, now), Ok(true));
    assert_eq!(
        entries.set("one more", lasting(""), false, now + SECOND),
        Ok(true)
    );
    assert_eq!(entries.map.len(), 1);
}

#[test]
fn a_heartbeat_lengthens_a_life_and_cannot_give_it_back() {
    let store = Store::new(None);
    let soon = Instant::now() + Duration::from_secs(60);
    assert_eq!(store.set("a", "1".into(), Some(soon), false), Ok(true));
    assert!(store.expire("a", Duration::from_secs(600)));
    assert!(store.lock().live("a", soon + SECOND).is_some());
    assert!(store.expire("a", Duration::ZERO));
    assert!(!store.expire("a", Duration::from_secs(600)));
    assert_eq!(store.get("a"), None);
    assert!(!store.delete("a"));
}

#[test]
fn watchers_hear_of_what_is_set_and_deleted() {
    let store = Store::new(None);
    let mut changes = store.changes();
    assert_eq!(store.set("a", String::new(), None, false), Ok(true));
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    assert_eq!(store.set("a", String::new(), None, false), Ok(false));
    assert!(!changes.has_changed().unwrap());
    assert!(store.delete("a") && !store.delete("a"));
    assert!(changes.has_changed().unwrap());
}

#[test]
fn a_token_is_compared_whole_and_not_shown() {
    let token = StoreToken::of_secret("s");
    let right = store_token("s");
    assert!(token.is(&right));
    for wrong in ["", &right[1..], &format!("{right}0"), &store_token("t")] {
        assert!(!token.is(wrong), "{wrong}");
    }
    assert_eq!(format!("{token:?}"), "StoreToken(..)");
}
