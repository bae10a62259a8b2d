//! A page of tasks has their specs, and never more of them than memory should hold.

use hub_engine::ports::{Journal, Window};
use hub_engine::records::TaskFilter;
use hub_engine::tasks::{PAGE_SPEC_BYTES, with_specs};
use hub_testkit::contract::sample::{task, task_id};
use hub_testkit::memory::MemoryStore;

#[tokio::test]
async fn a_page_ends_early_for_long_specs_and_goes_on_where_it_ended() {
    let store = MemoryStore::new();
    for n in 1..=12 {
        let mut t = task(n);
        if n % 2 == 0 {
            t.spec = vec![n as u8; PAGE_SPEC_BYTES / 2 - 10];
        }
        if n == 6 {
            t.spec = vec![6; 2 * PAGE_SPEC_BYTES];
        }
        store.accept(&t).await.unwrap();
    }
    let (mut before, mut pages) = (None, vec![]);
    loop {
        let found = store.tasks(&TaskFilter::default(), Window { before, limit: 100 }).await.unwrap();
        let (page, cut) = with_specs(&store, found).await.unwrap();
        for t in &page {
            assert!(t.spec == store.task(t.id).await.unwrap().unwrap().spec, "{} has its spec", t.id);
        }
        let numbers: Vec<u16> = page.iter().map(|t| (1..=12).find(|n| task_id(*n) == t.id).unwrap()).collect();
        before = page.last().map(|t| t.id);
        pages.push(numbers);
        if !cut {
            break;
        }
    }
    assert_eq!(pages, [vec![12, 11, 10, 9], vec![8, 7], vec![6, 5], vec![4, 3, 2, 1]]);
}
