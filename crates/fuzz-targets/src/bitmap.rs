//! Dirty bitmaps of one page size from those of another, against a count of bytes.
//!
//! Input: log2 of the page sizes (u8 each, modulo 10), the starts of both grids and of the range
//! (u16, modulo 2048) and its length (u16, modulo 8192), then the bitmap's words.

use limosa_protocol::bitmap::{DirtyBitmap, Grid, get, regranulate, words_for};

use crate::input::Input;

/// See the module.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mut page_size = || 1u64 << (input.take::<u8>() % 10);
    let (from_size, to_size) = (page_size(), page_size());
    let mut address = |most: u64| u64::from(input.take::<u16>()) % most;
    let from = Grid { iova: address(2048), page_size: from_size };
    let to = Grid { iova: address(2048), page_size: to_size };
    let iova = from.iova.max(to.iova) + address(2048);
    let length = address(8192);
    let pages = |grid: Grid| (iova + length - grid.iova).div_ceil(grid.page_size);
    let mut src = input.words();
    src.resize(words_for(pages(from)), 0);

    let page_of = |grid: Grid, byte: u64| (byte - grid.iova) / grid.page_size;
    let mut expected = vec![0; words_for(pages(to))];
    for byte in (iova..iova + length).filter(|byte| get(&src, page_of(from, *byte))) {
        let page = page_of(to, byte);
        expected[(page / 64) as usize] |= 1 << (page % 64);
    }

    let mut dst = vec![0; expected.len()];
    regranulate(&src, from, &mut dst, to, iova, length);
    assert_eq!(dst, expected);

    let mut log = DirtyBitmap::new(pages(from)).expect("a few pages");
    log.or_words(0, &src, pages(from));
    let mut dst = vec![0; expected.len()];
    log.report_exclusive(from, &mut dst, to, iova, length);
    assert_eq!(dst, expected);
    for page in 0..pages(from) {
        let start = from.iova + page * from.page_size;
        let reported = start >= iova && start + from.page_size <= iova + length;
        assert_eq!(log.get(page), get(&src, page) && !reported, "page {page}");
    }
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let input = |sizes: [u8; 2], numbers: [u16; 4], words: &[u64]| {
        let mut bytes = sizes.to_vec();
        numbers.iter().for_each(|number| bytes.extend(number.to_ne_bytes()));
        words.iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
        bytes
    };
    vec![
        ("same", input([3, 3], [0, 0, 0, 4096], &[0xf0f0, !0, 1 << 63])),
        ("to_coarse", input([2, 5], [64, 32, 32, 4000], &[0x8000_0000_0000_0001; 9])),
        ("to_much_coarser", input([0, 9], [0, 512, 100, 8000], &[0, 0, 1, 0, !0])),
        ("to_fine", input([6, 1], [7, 9, 12, 4001], &[0b1011, !0])),
        ("out_of_step", input([5, 4], [1, 2, 3, 3000], &[0xaaaa_5555_ffff_0000; 3])),
    ]
}
