use super::*;

/// A machine: `/bin` is `/usr/bin`, `rm` and `sh` are names of one busybox, `python3` is a link.
fn find(name: &str) -> Option<Executable> {
    let path = match name {
        "/bin/sh" => "/usr/bin/sh",
        "/bin/rm" => "/usr/bin/rm",
        "./rm" | "../../usr/bin/rm" => "/usr/bin/rm",
        n if n.starts_with('/') => n,
        n if n.contains('/') => return None,
        n => return find(&format!("/usr/bin/{n}")),
    };
    let inode = match path {
        "/usr/bin/rm" | "/usr/bin/sh" | "/usr/bin/busybox" | "/tmp/innocent" => 1,
        "/usr/bin/python3" | "/usr/bin/python3.12" => 2,
        "/usr/bin/make" | "/tmp/d/make" => 3,
        "/usr/bin/git" => 4,
        _ => return None,
    };
    Some(Executable { path: path.into(), file: (9, inode) })
}
fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}
fn rule(line: &str) -> Rule {
    let mut words = words(line);
    Rule { program: words.remove(0), args_prefix: words, matches: vec![], not_matches: vec![] }
}
fn rules(lines: &[&str]) -> Vec<Rule> {
    lines.iter().map(|l| rule(l)).collect()
}
fn judged(c: &Ceiling, line: &str) -> Result<String, String> {
    c.admit_program(words(line), &find).map(|argv| argv.join(" ")).map_err(|r| format!("{}: {}", r.code.as_str(), r.detail))
}
fn allowing(lines: &[&str]) -> Ceiling {
    Ceiling { allow: Some(rules(lines)), ..Ceiling::OPEN }
}
fn denying(lines: &[&str]) -> Ceiling {
    Ceiling { deny: rules(lines), ..Ceiling::OPEN }
}

#[test]
fn without_rules_nothing_is_looked_up() {
    let argv = Ceiling::OPEN.admit_program(words("../x y"), &|_| panic!("looked up"));
    assert_eq!(argv.unwrap(), ["../x", "y"]);
}

#[test]
fn deny_goes_by_the_file_under_whatever_name() {
    let c = denying(&["rm -r"]);
    let no = "policy_denied: ceiling: deny[0] {program: \"rm\", args_prefix: [\"-r\"]}";
    for line in ["rm -r x", "/bin/rm -r", "/usr/bin/rm -r", "./rm -r", "../../usr/bin/rm -r", "/tmp/innocent -r", "busybox -r"] {
        assert_eq!(judged(&c, line).unwrap_err(), no, "{line}");
    }
    assert_eq!(judged(&c, "rm x -r").unwrap(), "/usr/bin/rm x -r", "only what the arguments begin with");
    assert_eq!(judged(&c, "make -r").unwrap(), "/usr/bin/make -r");
    assert_eq!(judged(&denying(&["/usr/bin/python3"]), "python3.12").unwrap_err().split(' ').nth(2), Some("deny[0]"));
}

#[test]
fn a_denied_name_that_is_not_there_is_denied_too() {
    assert!(judged(&denying(&["nc"]), "nc -l").unwrap_err().starts_with("policy_denied"));
    assert_eq!(judged(&denying(&["nc"]), "gone").unwrap_err(), "not_found: program \"gone\" was not found");
    assert_eq!(judged(&denying(&["nc"]), "./gone").unwrap_err(), "not_found: program \"./gone\" was not found");
}

#[test]
fn allow_goes_by_the_path_it_is_called_by() {
    let c = allowing(&["rm", "git status", "/tmp/d/make"]);
    assert_eq!(judged(&c, "rm -r x").unwrap(), "/usr/bin/rm -r x");
    assert_eq!(judged(&c, "/bin/rm").unwrap(), "/usr/bin/rm");
    assert_eq!(judged(&c, "/tmp/d/make").unwrap(), "/tmp/d/make");
    assert_eq!(judged(&c, "git status -s").unwrap(), "/usr/bin/git status -s");
    for line in ["sh -c x", "busybox rm", "/tmp/innocent", "git push", "git", "make", "gone", "./gone", ""] {
        assert!(judged(&c, line).unwrap_err().starts_with("policy_denied: ceiling: allow: "), "{line}");
    }
    assert!(judged(&allowing(&[]), "git").is_err(), "an empty list allows nothing");
    assert_eq!(judged(&allowing(&["gone"]), "gone").unwrap_err(), "not_found: program \"gone\" was not found");
}

#[test]
fn deny_weighs_more_than_allow() {
    let c = Ceiling { deny: rules(&["git push"]), ..allowing(&["git"]) };
    assert!(judged(&c, "git push -f").unwrap_err().contains("deny[0] {program: \"git\""));
    assert_eq!(judged(&c, "git pull").unwrap(), "/usr/bin/git pull");
}

#[test]
fn users_time_outs_and_scripts() {
    let (a, b) = (UserId::from_bytes([1; 16]), UserId::from_bytes([2; 16]));
    let c = Ceiling { users: Some(vec![a]), timeout_secs: Some(60), scripts: false, ..Ceiling::OPEN };
    assert_eq!(c.admit(a), Ok(()));
    assert_eq!(c.admit(b).unwrap_err().detail, format!("ceiling: users: {b} is not named"));
    assert!(Ceiling { users: Some(vec![]), ..Ceiling::OPEN }.admit(a).is_err());
    assert_eq!((c.admit_timeout(1), c.admit_timeout(60)), (Ok(()), Ok(())));
    assert_eq!(c.admit_timeout(61).unwrap_err().detail, "ceiling: limits.timeout_secs: 60, and the task has 61");
    assert_eq!(c.admit_timeout(0).unwrap_err().detail, "ceiling: limits.timeout_secs: 60, and the task has no time-out");
    assert_eq!(c.admit_scripts().unwrap_err().detail, "ceiling: scripts: false");
    let o = Ceiling::OPEN;
    assert_eq!((o.admit(b), o.admit_timeout(0), o.admit_scripts()), (Ok(()), Ok(()), Ok(())));
}

#[test]
fn a_detail_has_an_end() {
    let long = rule(&format!("rm {}", "x".repeat(9000)));
    let c = Ceiling { deny: vec![long.clone()], ..Ceiling::OPEN };
    let r = c.admit_program(words(&format!("rm {}", long.args_prefix[0])), &find).unwrap_err();
    assert_eq!((r.code, r.detail.chars().count()), (ReasonCode::PolicyDenied, MAX_DETAIL));
}

#[test]
fn examples_are_checked_against_the_machine() {
    let with = |matches: &[&str], not: &[&str]| {
        let list = |l: &[&str]| l.iter().map(|a| words(a)).collect();
        Rule { matches: list(matches), not_matches: list(not), ..rule("rm -r") }
    };
    let deny = |r: Rule| Ceiling { deny: vec![rule("git"), r], ..Ceiling::OPEN }.check(&find).map_err(|e| e.to_string());
    assert_eq!(deny(with(&["rm -r x", "/bin/rm -r", "sh -r"], &["rm x", "make -r"])), Ok(()));
    assert_eq!(deny(with(&["rm x"], &[])).unwrap_err(), "deny[1].match: the rule does not hit its example [\"rm\", \"x\"]");
    assert_eq!(deny(with(&[], &["sh -r"])).unwrap_err(), "deny[1].not_match: the rule hits its example [\"sh\", \"-r\"]");
    assert!(deny(with(&[""], &[])).unwrap_err().contains("begins with a program"));
    let allow = |r: Rule| Ceiling { allow: Some(vec![r]), ..Ceiling::OPEN }.check(&find).map_err(|e| e.key);
    assert_eq!(allow(with(&["/bin/rm -r"], &["sh -r"])), Ok(()), "of one file with many names only this one");
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let key = |c: Ceiling| c.check(&find).map_err(|e| e.key);
    for program in ["", "./ls", "../bin/sh", "bin/sh", "a\0"] {
        assert_eq!(key(denying(&["x"]).with(program)), Err("deny[0].program".into()), "{program:?}");
    }
    let nul = Rule { args_prefix: vec!["\0".into()], ..rule("rm") };
    assert_eq!(key(Ceiling { allow: Some(vec![nul]), ..Ceiling::OPEN }), Err("allow[0].args_prefix".into()));
    for n in [0, MOST_TASKS + 1] {
        assert_eq!(key(Ceiling { max_tasks: Some(n), ..Ceiling::OPEN }), Err("max_tasks".into()));
    }
    assert_eq!(key(Ceiling { timeout_secs: Some(0), ..Ceiling::OPEN }), Err("limits.timeout_secs".into()));
    assert_eq!(key(Ceiling { max_tasks: Some(1), timeout_secs: Some(1), ..allowing(&[]) }), Ok(()));
}

impl Ceiling {
    fn with(mut self, program: &str) -> Self {
        self.deny[0].program = program.into();
        self
    }
}

#[test]
fn words_of_a_node_about_itself() {
    for c in [Closed::Disabled, Closed::CeilingUnreadable] {
        assert_eq!(Closed::parse(c.as_str()), Some(c));
    }
    assert_eq!((Closed::parse(""), Closed::parse("of a later version")), (None, Some(Closed::Disabled)));
}
