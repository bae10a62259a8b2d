use super::*;
use std::os::unix::fs::{PermissionsExt, symlink};

fn refused(text: &str) -> String {
    parse("c.yaml", text).expect_err("must be refused").to_string()
}
fn data() -> (tempfile::TempDir, DataDir) {
    let tmp = tempfile::tempdir().unwrap();
    let dir = DataDir::new(tmp.path());
    (tmp, dir)
}

#[test]
fn the_default_bounds_nothing_and_names_every_key_that_is_built() {
    assert_eq!(parse("c.yaml", DEFAULT).unwrap(), Ceiling::OPEN);
    let all: String =
        DEFAULT.lines().skip_while(|l| !l.contains("Bounds")).skip(1).map(|l| l.trim_start_matches("# ").to_owned() + "\n").collect();
    let c = parse("c.yaml", &all).unwrap();
    assert_eq!((c.max_tasks, c.timeout_secs, c.users.map(|u| u.len())), (Some(2), Some(3600), Some(1)));
    let rules = c.allow.unwrap();
    assert_eq!((rules[1].program.as_str(), &rules[1].args_prefix[..], c.deny.len()), ("git", &["status".to_owned()][..], 1));
    assert_eq!((c.deny[0].matches.len(), c.deny[0].not_matches.len()), (1, 1));
    assert!(!parse("c.yaml", "scripts: false").unwrap().scripts);
}

#[test]
fn what_is_not_understood_is_refused_by_its_key() {
    for (text, want) in [
        ("alow: []", "c.yaml: alow: unknown key"),
        ("limits: { timeout: 5 }", "c.yaml: limits.timeout: unknown key"),
        ("deny: [{ program: rm, args: [x] }]", "c.yaml: deny[0].args: unknown key"),
        ("deny: [{ args_prefix: [x] }]", "c.yaml: deny[0].program: is missing"),
        ("deny: [rm]", "c.yaml: deny[0]: a mapping is expected"),
        ("deny: rm", "c.yaml: deny: a list is expected"),
        ("deny: [{ program: rm, match: [rm] }]", "c.yaml: deny[0].match: a list is expected"),
        ("deny: [{ program: 7 }]", "c.yaml: deny[0].program: a text is expected"),
        ("deny: [{ program: ./ls }]", "c.yaml: deny[0].program: \"./ls\" is neither a name on the fixed PATH nor an absolute path"),
        (
            "allow: [{ program: ../bin/sh }]",
            "c.yaml: allow[0].program: \"../bin/sh\" is neither a name on the fixed PATH nor an absolute path",
        ),
        ("deny: [{ program: \"\" }]", "c.yaml: deny[0].program: \"\" is neither a name on the fixed PATH nor an absolute path"),
        ("deny: [{ program: \"a\\0\" }]", "c.yaml: deny[0].program: \"a\\0\" is neither a name on the fixed PATH nor an absolute path"),
        ("deny: [{ program: sh, match: [[ls]] }]", "c.yaml: deny[0].match: the rule does not hit its example [\"ls\"]"),
        ("deny: [{ program: sh, not_match: [[/bin/sh, x]] }]", "c.yaml: deny[0].not_match: the rule hits its example [\"/bin/sh\", \"x\"]"),
        ("scripts: \"no\"", "c.yaml: scripts: true or false is expected"),
        ("max_tasks: 0", "c.yaml: max_tasks: 0 is not between 1 and 4096; `cortex-node disable` takes no tasks at all"),
        ("max_tasks: -1", "c.yaml: max_tasks: a whole number is expected"),
        ("max_tasks: 99999999999", "c.yaml: max_tasks: 4294967295 is not between 1 and 4096; `cortex-node disable` takes no tasks at all"),
        ("limits: { timeout_secs: 0 }", "c.yaml: limits.timeout_secs: 0 leaves no time to run; take the key away for no bound"),
        ("users: [alice]", "c.yaml: users: \"alice\" is not a user's id (user_…), as `cortex whoami` shows it"),
        ("mode: lenient", "c.yaml: mode: \"lenient\" is none of permissive, strict"),
        ("network: true", "c.yaml: network: a text is expected"),
        ("", "c.yaml: (yaml): a ceiling is a mapping with keys such as mode, allow, deny, users, max_tasks"),
        ("- deny", "c.yaml: (yaml): a ceiling is a mapping with keys such as mode, allow, deny, users, max_tasks"),
    ] {
        assert_eq!(refused(text), want, "{text}");
    }
    for text in ["deny: [", "a: b: c", "\u{1}", "deny: []\ndeny: []", "\tmode: strict"] {
        assert!(refused(text).starts_with("c.yaml"), "{text}");
    }
}

#[test]
fn what_is_not_built_is_refused_and_never_taken() {
    for (text, key) in [
        ("mode: strict", "mode"),
        ("network: proxy", "network"),
        ("network: none", "network"),
        ("ask: [{ program: rm }]", "ask"),
        ("hosts: [example.org]", "hosts"),
        ("read: [/srv]", "read"),
        ("write: [/srv]", "write"),
        ("devices: [gpu]", "devices"),
        ("env: [A]", "env"),
        ("limits: { memory_bytes: 1 }", "limits.memory_bytes"),
        ("limits: { cpu_percent: 1 }", "limits.cpu_percent"),
        ("limits: { pids: 1 }", "limits.pids"),
        ("limits: { output_bytes: 1 }", "limits.output_bytes"),
    ] {
        assert!(refused(text).starts_with(&format!("c.yaml: {key}: not yet: ")), "{}", refused(text));
    }
}

#[test]
fn names_lead_where_they_are_executed() {
    let tmp = tempfile::tempdir().unwrap();
    let root = tmp.path().canonicalize().unwrap();
    let make = |name: &str, mode: u32| {
        std::fs::write(root.join(name), "x").unwrap();
        std::fs::set_permissions(root.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    std::fs::create_dir(root.join("real")).unwrap();
    make("real/busybox", 0o755);
    make("real/plain", 0o644);
    symlink("busybox", root.join("real/ls")).unwrap();
    symlink("busybox", root.join("real/rm")).unwrap();
    symlink("nowhere", root.join("real/gone")).unwrap();
    symlink("real", root.join("link")).unwrap();
    std::fs::hard_link(root.join("real/busybox"), root.join("hard")).unwrap();
    let at = |name: &str| find(Some(&root), name);
    let path = |name: &str| at(name).map(|e| e.path);
    let real = |name: &str| Some(format!("{}/{name}", root.display()));
    assert_eq!(path("./link/ls"), real("real/ls"), "links in folders are resolved, the name is kept");
    assert_eq!(path(&format!("{}/link/../link/rm", root.display())), real("real/rm"));
    let files: Vec<_> = ["./real/ls", "link/rm", "./hard", "real/busybox"].iter().map(|n| at(n).unwrap().file).collect();
    assert!(files.windows(2).all(|w| w[0] == w[1]), "one file: {files:?}");
    for none in ["", ".", "./", "..", "./real", "./link/gone", "./real/ls/x", "./real/..", "/", "real/nothing", "a-name-that-is-nowhere"] {
        assert_eq!(path(none), None, "{none}");
    }
    assert_eq!(find(None, "./real/ls"), None, "relative to nothing");
    // On the fixed PATH, whatever this process has.
    let (sh, by_path) = (find(None, "sh").unwrap(), find(None, "/bin/sh").unwrap());
    assert_eq!(sh.file, by_path.file);
    assert!(sh.path.starts_with('/'));
    assert!(executable(&root.join("real/plain"), true).is_none() && executable(&root.join("real/plain"), false).is_some());
}

#[test]
fn what_cannot_be_read_closes_and_what_is_not_there_does_not() {
    let (_tmp, dir) = data();
    let file = dir.ceiling();
    let mut o = Owner::new(dir.clone());
    assert!(!o.look());
    assert_eq!((o.closed(), o.ceiling()), (None, Some(&Ceiling::OPEN)));
    let closed = |o: &mut Owner| {
        o.look();
        o.closed()
    };
    std::fs::write(&file, "max_tasks: 3").unwrap();
    assert!(o.look() && !o.look(), "once for a change");
    assert_eq!((o.closed(), o.places(8), o.places(2)), (None, 3, 2));
    std::fs::write(&file, "max_tasks: three").unwrap();
    assert_eq!(closed(&mut o), Some(Closed::CeilingUnreadable));
    assert!(o.problem().unwrap().to_string().ends_with("max_tasks: a whole number is expected"));
    assert_eq!((o.ceiling(), o.places(8)), (None, 8));

    let other = dir.path().join("elsewhere");
    for make in [
        &(|| symlink("nowhere", &file).unwrap()) as &dyn Fn(),
        &|| std::fs::create_dir(&file).unwrap(),
        &|| rustix::fs::mkfifoat(rustix::fs::CWD, &file, rustix::fs::Mode::RUSR).unwrap(),
        &|| std::fs::write(&file, [b'#'; MAX_BYTES as usize + 1]).unwrap(),
        &|| std::fs::write(&file, b"deny: [\xff]").unwrap(),
        &|| {
            std::fs::write(&other, "nonsense").unwrap();
            symlink(&other, &file).unwrap();
        },
    ] {
        let _ = std::fs::remove_dir(&file).or_else(|_| std::fs::remove_file(&file));
        make();
        assert_eq!(closed(&mut o), Some(Closed::CeilingUnreadable));
    }
    std::fs::write(&other, "scripts: false").unwrap();
    assert_eq!((closed(&mut o), o.ceiling().unwrap().scripts), (None, false), "what a link leads to is looked at");
    std::fs::remove_file(&file).unwrap();
    assert!(o.look() && o.ceiling() == Some(&Ceiling::OPEN), "taken away: the default again");
}

#[test]
fn disabled_survives_and_weighs_most() {
    let (_tmp, dir) = data();
    let mut o = Owner::new(dir.clone());
    assert!(disable(&dir, "now").unwrap() && !disable(&dir, "later").unwrap());
    assert_eq!(std::fs::read_to_string(dir.disabled()).unwrap(), "now\n");
    assert!(o.look());
    assert_eq!((o.closed(), Owner::new(dir.clone()).closed()), (Some(Closed::Disabled), Some(Closed::Disabled)));
    std::fs::write(dir.ceiling(), "nonsense").unwrap();
    o.look();
    assert_eq!(o.closed(), Some(Closed::Disabled));
    assert!(enable(&dir).unwrap() && !enable(&dir).unwrap());
    assert!(o.look());
    assert_eq!(o.closed(), Some(Closed::CeilingUnreadable));
}

#[test]
fn a_join_makes_the_file_and_leaves_its_owners_alone() {
    let (_tmp, dir) = data();
    assert!(make(&dir).unwrap() && !make(&dir).unwrap());
    assert_eq!(load(&dir).unwrap(), (Some(DEFAULT.to_owned()), Ceiling::OPEN));
    assert_eq!(std::fs::metadata(dir.ceiling()).unwrap().permissions().mode() & 0o777, 0o600);
    std::fs::write(dir.ceiling(), "scripts: false").unwrap();
    assert!(!make(&dir).unwrap() && !load(&dir).unwrap().1.scripts);
    std::fs::remove_file(dir.ceiling()).unwrap();
    symlink("nowhere", dir.ceiling()).unwrap();
    assert!(!make(&dir).unwrap() && load(&dir).is_err());
}
