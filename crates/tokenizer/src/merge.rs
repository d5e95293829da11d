//! Merging symbols, the heart of byte-pair encoding (Sennrich et al. 2016, section 3.2): of all
//! neighbouring pairs that may be merged, merge the one with the lowest rank (the leftmost of
//! equals), until none is left.
//!
//! Byte-level vocabularies rank pairs by the list of merges, SentencePiece ones by the score of
//! the merged piece; both use this one routine.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// No token: a symbol that the vocabulary does not hold by itself.
pub(crate) const NO_ID: u32 = u32::MAX;

/// A run of the text's bytes `start..end` that is one symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Symbol {
    pub start: usize,
    pub end: usize,
    pub id: u32,
}

/// From this many symbols on a heap is used: below, looking at all pairs again after each merge
/// is cheaper than keeping the heap (words have 4 symbols in the mean).
const HEAP_FROM: usize = 24;

/// Merges neighbours of `symbols` in place. `pair(left, right)` gives the rank of a pair and the
/// id of the merged token, or nothing where the pair does not merge.
///
/// Costs O(n log n) lookups' worth of work for n symbols.
pub(crate) fn merge(symbols: &mut Vec<Symbol>, pair: impl Fn(&Symbol, &Symbol) -> Option<(u32, u32)>) {
    if symbols.len() < HEAP_FROM {
        merge_short(symbols, pair);
    } else {
        merge_long(symbols, pair);
    }
}

fn merge_short(symbols: &mut Vec<Symbol>, pair: impl Fn(&Symbol, &Symbol) -> Option<(u32, u32)>) {
    // ranks[i] belongs to the pair (i, i + 1).
    let mut ranks: [Option<(u32, u32)>; HEAP_FROM] = [None; HEAP_FROM];
    let mut n = symbols.len();
    for i in 1..n {
        ranks[i - 1] = pair(&symbols[i - 1], &symbols[i]);
    }
    loop {
        let mut best: Option<(u32, usize, u32)> = None;
        for (i, rank) in ranks.iter().enumerate().take(n.saturating_sub(1)) {
            if let Some((rank, id)) = *rank
                && best.is_none_or(|(least, ..)| rank < least)
            {
                best = Some((rank, i, id));
            }
        }
        let Some((_, i, id)) = best else { return };
        symbols[i].end = symbols[i + 1].end;
        symbols[i].id = id;
        symbols.remove(i + 1);
        ranks.copy_within(i + 1..n, i);
        n -= 1;
        ranks[i] = if i + 1 < n { pair(&symbols[i], &symbols[i + 1]) } else { None };
        if i > 0 {
            ranks[i - 1] = pair(&symbols[i - 1], &symbols[i]);
        }
    }
}

fn merge_long(symbols: &mut Vec<Symbol>, pair: impl Fn(&Symbol, &Symbol) -> Option<(u32, u32)>) {
    const NONE: usize = usize::MAX;
    let n = symbols.len();
    let mut next: Vec<usize> = (1..=n).map(|i| if i < n { i } else { NONE }).collect();
    let mut prev: Vec<usize> = (0..n).map(|i| if i > 0 { i - 1 } else { NONE }).collect();
    let mut gone = vec![false; n];
    // (rank, position, end of the left symbol, end of the right one, id): the two ends tell
    // whether the pair is still what it was when it was put into the heap.
    let mut heap = BinaryHeap::new();
    let offer = |heap: &mut BinaryHeap<_>, symbols: &[Symbol], i: usize, j: usize| {
        if let Some((rank, id)) = pair(&symbols[i], &symbols[j]) {
            heap.push(Reverse((rank, i, symbols[i].end, symbols[j].end, id)));
        }
    };
    for i in 1..n {
        offer(&mut heap, symbols, i - 1, i);
    }
    while let Some(Reverse((_, i, left_end, right_end, id))) = heap.pop() {
        if gone[i] || symbols[i].end != left_end {
            continue;
        }
        let j = next[i];
        if j == NONE || symbols[j].end != right_end {
            continue;
        }
        symbols[i].end = right_end;
        symbols[i].id = id;
        gone[j] = true;
        next[i] = next[j];
        if next[i] != NONE {
            prev[next[i]] = i;
            offer(&mut heap, symbols, i, next[i]);
        }
        if prev[i] != NONE {
            offer(&mut heap, symbols, prev[i], i);
        }
    }
    let mut i = 0;
    symbols.retain(|_| {
        i += 1;
        !gone[i - 1]
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Symbols are single bytes with small ids; a pair (a, b) merges into (3 a + 5 b + 1) % 61
    /// where that lies below 40, ranked by the pair itself.
    fn toy(left: &Symbol, right: &Symbol) -> Option<(u32, u32)> {
        let id = (3 * left.id + 5 * right.id + 1) % 61;
        (id < 40).then_some(((left.id * 7 + right.id * 13) % 19, id))
    }

    fn symbols(ids: &[u32]) -> Vec<Symbol> {
        ids.iter().enumerate().map(|(i, &id)| Symbol { start: i, end: i + 1, id }).collect()
    }

    proptest! {
        #[test]
        fn heap_equals_plain_search(ids in prop::collection::vec(0u32..40, 0..HEAP_FROM)) {
            let (mut short, mut long) = (symbols(&ids), symbols(&ids));
            merge_short(&mut short, toy);
            merge_long(&mut long, toy);
            prop_assert_eq!(short, long);
        }
    }

    #[test]
    fn leftmost_of_equals_merges_first() {
        // a a a with "aa" -> 1: the first two merge, not the last two.
        let mut s = symbols(&[0, 0, 0]);
        merge(&mut s, |l, r| (l.id == 0 && r.id == 0).then_some((0, 1)));
        assert_eq!(s.iter().map(|s| s.id).collect::<Vec<_>>(), [1, 0]);
    }
}
