//! Every case in `cases/` agrees. A case is put there when it once did not.
use bunshin_oracle::{Case, Comparison, Judge, Native, Options};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

#[test]
fn cases_agree() {
    #[cfg(feature = "translator")]
    let mut engines = [false, true].map(|hot| bunshin_oracle::translated::translated(hot, false).unwrap());
    let mut native = Rc::new(RefCell::new(Native::new().unwrap()));
    let mut again = native.clone();
    let mut judges: Vec<&mut dyn Judge> = vec![&mut again];
    #[cfg(feature = "translator")]
    judges.extend(engines.iter_mut().map(|e| e as &mut dyn Judge));
    let mut bad = Vec::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "txt"));
    files.sort();
    assert!(!files.is_empty(), "no cases in {}", folder.display());
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let case = Case::from_text(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        for right in &mut judges {
            let mut comparison =
                Comparison { left: &mut native, right: *right, all_flags: None, options: Options::default() };
            let (_, found) = comparison.run(&case);
            if !found.is_empty() {
                bad.push(format!("{}\n{}", path.display(), comparison.report(&case, &found)));
            }
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}
