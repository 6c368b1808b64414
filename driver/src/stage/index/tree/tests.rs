use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::*;

const FAR: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
enum Step {
    Insert(u64, u32),
    /// In the order of their keys.
    InsertMany {
        first: u64,
        apart: u64,
        count: u64,
    },
    /// Those from the first key to the second whose value is not a multiple of the third.
    Extract(u64, u64, u32),
}

fn any_step(keys: u64) -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..keys, any::<u32>()).prop_map(|(key, value)| Step::Insert(key, value)),
        1 => (0..keys, 1..4u64, 1..200u64)
            .prop_map(|(first, apart, count)| Step::InsertMany { first, apart, count }),
        2 => (0..keys, 0..keys, prop_oneof![Just(FAR as u32), 2..5u32])
            .prop_map(|(a, b, kept)| Step::Extract(a.min(b), a.max(b), kept)),
    ]
}

/// The invariants T1 to T3. T4 depends on the history.
fn check<const LEAF: usize, const BRANCH: usize>(tree: &Tree<u32, LEAF, BRANCH>) {
    let mut last = None;
    let mut len = 0;
    assert_eq!(tree.branches.firsts.len(), tree.branches.len());
    for (first, row) in tree.branches.firsts.iter().zip(&tree.branches.items) {
        assert!((1..=BRANCH).contains(&row.len()), "T2: a branch of {} leaves", row.len());
        assert_eq!(row.firsts.len(), row.len());
        assert_eq!(*first, row.firsts[0], "T3");
        for (first, leaf) in row.firsts.iter().zip(&row.items) {
            assert!((1..=LEAF).contains(&leaf.len), "T2: a leaf of {} entries", leaf.len);
            assert_eq!(*first, leaf.keys[0], "T3");
            for key in leaf.keys() {
                assert!(last.is_none_or(|last| last < *key), "T1");
                last = Some(*key);
                len += 1;
            }
        }
    }
    assert_eq!(tree.len(), len);
}

fn insert<const LEAF: usize, const BRANCH: usize>(tree: &mut Tree<u32, LEAF, BRANCH>, key: u64, value: u32) {
    let before = tree.before(key + 1);
    match before.filter(|at| tree.get(*at).0 == key) {
        Some(at) => *tree.get_mut(at) = value,
        None => tree.insert_after(before, key, value),
    }
}

/// Does `steps` with a tree and with the standard library's map, which must agree all the time.
fn compare<const LEAF: usize, const BRANCH: usize>(keys: u64, steps: &[Step]) -> Result<(), TestCaseError> {
    let mut tree = Tree::<u32, LEAF, BRANCH>::default();
    let mut map = BTreeMap::new();
    for step in steps {
        match *step {
            Step::Insert(key, value) => {
                insert(&mut tree, key, value);
                map.insert(key, value);
            }
            Step::InsertMany { first, apart, count } => {
                for key in (0..count).map(|n| first + n * apart) {
                    insert(&mut tree, key, 7);
                    map.insert(key, 7);
                }
            }
            Step::Extract(start, end, kept) => {
                let mut taken = Vec::new();
                tree.extract(tree.before(start), end, |key, value| {
                    let is_to_go = value % kept != 0;
                    taken.extend(is_to_go.then_some((key, *value)));
                    is_to_go
                });
                let expected: Vec<_> = map.extract_if(start..end, |_, value| *value % kept != 0).collect();
                prop_assert_eq!(taken, expected);
            }
        }
        check(&tree);
        prop_assert!(tree.entries(None, FAR).eq(map.iter().map(|(key, value)| (*key, *value))));
    }
    for key in 0..keys + 1000 {
        let before = tree.before(key);
        let expected = map.range(..key).next_back().map(|(key, value)| (*key, *value));
        prop_assert_eq!(before.map(|at| tree.get(at)).map(|(key, value)| (key, *value)), expected);
        let behind = map.range(key..key + 40).map(|(key, value)| (*key, *value));
        prop_assert!(tree.entries(before, key + 40).eq(behind));
    }
    let again: Tree<u32, LEAF, BRANCH> = map.iter().map(|(key, value)| (*key, *value)).collect();
    check(&again);
    prop_assert!(again.entries(None, FAR).eq(tree.entries(None, FAR)));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, ..ProptestConfig::default() })]

    #[test]
    fn does_what_the_standard_map_does(steps in prop::collection::vec(any_step(400), 1..80)) {
        compare::<4, 4>(400, &steps)?;
        compare::<32, 128>(400, &steps)?;
    }

    #[test]
    fn does_what_the_standard_map_does_when_it_is_large(steps in prop::collection::vec(any_step(6000), 100..200)) {
        compare::<8, 8>(6000, &steps)?;
    }
}

/// Bytes that an entry takes, all in all.
fn bytes_per_entry(tree: &Tree<[u64; 4], 32, 128>) -> usize {
    let rows = tree.branches.items.iter();
    let leaves: usize = rows.clone().map(|row| row.items.len() * size_of::<Leaf<[u64; 4], 32>>()).sum();
    let inner: usize = rows.map(|row| (row.firsts.capacity() + row.items.capacity()) * 8).sum();
    (leaves + inner) / tree.len()
}

#[test]
fn takes_the_memory_that_the_index_says() {
    let mut tree = Tree::default();
    let add =
        |tree: &mut Tree<[u64; 4], 32, 128>, key: u64| tree.insert_after(tree.before(key), key, [key; 4]);
    let scattered = |n: u64| n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 8;
    (0..100_000).for_each(|n| add(&mut tree, scattered(n)));
    assert!(bytes_per_entry(&tree) <= 65, "{} bytes after scattered inserts", bytes_per_entry(&tree));
    // What the flusher leaves behind does not keep the memory of what it took.
    tree.extract(None, FAR, |_, [key, ..]| key % 8 != 0);
    assert!(bytes_per_entry(&tree) <= 90, "{} bytes after removals", bytes_per_entry(&tree));
    for (order, key) in [("ascending", (|n| n) as fn(u64) -> u64), ("descending", |n| 100_000 - n)] {
        let mut tree = Tree::default();
        (0..100_000).for_each(|n| add(&mut tree, key(n)));
        assert!(bytes_per_entry(&tree) <= 43, "{} bytes, {order}", bytes_per_entry(&tree));
    }
    // The worst that are known. Each just before the one before and behind others, where leaves are halved and then left alone.
    let mut tree = Tree::default();
    (0..100_000u64).for_each(|n| add(&mut tree, (n / 1000 + 1) * 1_000_000 - n % 1000));
    assert!(bytes_per_entry(&tree) <= 95, "{} bytes, falling in runs", bytes_per_entry(&tree));
    // One between each two full leaves, then one into the middle of each.
    let mut tree = Tree::default();
    (0..100_000u64).for_each(|n| add(&mut tree, n * 4));
    (0..3_124u64).for_each(|leaf| add(&mut tree, leaf * 128 + 125));
    (0..3_124u64).for_each(|leaf| add(&mut tree, leaf * 128 + 33));
    assert!(bytes_per_entry(&tree) <= 120, "{} bytes with small leaves between", bytes_per_entry(&tree));
    // One left of each branch.
    let mut tree = Tree::default();
    (0..64 * 4096u64).for_each(|n| add(&mut tree, n));
    tree.extract(None, FAR, |key, _| key % 4096 != 0);
    assert!(bytes_per_entry(&tree) <= 110, "{} bytes of what was left", bytes_per_entry(&tree));
}

#[test]
fn what_shrank_beside_an_untouched_branch_is_joined() {
    let mut tree: Tree<u32, 4, 4> = (0..24).map(|key| (key, 0)).collect();
    assert_eq!(tree.branches.items.iter().map(Row::len).collect::<Vec<_>>(), [4, 2]);
    tree.extract(None, FAR, |key, _| key < 12);
    assert_eq!(tree.branches.len(), 1, "T4");
}

#[test]
fn leaves_that_meet_as_branches_are_joined_are_settled() {
    let mut tree: Tree<u32, 4, 4> = (0..32).map(|key| (key, 0)).collect();
    tree.extract(None, FAR, |key, _| key != 12 && key != 16);
    check(&tree);
    assert_eq!((tree.branches.len(), tree.branches.items[0].len(), tree.len()), (1, 1, 2), "T4");
}
