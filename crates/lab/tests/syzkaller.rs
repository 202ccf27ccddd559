//! `contrib/syzkaller`: its constants and layouts are those of the headers of the kernel under test.

#[path = "../../check/tests/it/syzkaller/description.rs"]
mod description;

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// What headers have only from some release on, and the macro that came with it.
const NEWER: [(&str, &str); 3] = [
    ("VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2", "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2"),
    ("VFIO_MIG_SET_PRECOPY_INFO_V2", "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2"),
    ("vfio_device_bind_iommufd", "VFIO_DEVICE_BIND_FLAG_TOKEN"),
];

/// A program that is compiled only if all is as the description says.
fn program(header: &Path) -> String {
    let mut text = format!(
        "#define __user\n#define __counted_by(member)\n#include <fcntl.h>\n#include <stddef.h>\n#include <linux/types.h>\n#include <linux/ioctl.h>\n#include \"{}\"\n",
        header.display()
    );
    for (name, value) in description::defines() {
        writeln!(text, "#define {name} {value}").unwrap();
    }
    let mut hold = |what: &str, assertion: String| {
        let newer = NEWER.iter().find(|(name, _)| *name == what);
        let assertion = format!("_Static_assert({assertion}, \"{what}\");");
        match newer {
            Some((_, since)) => writeln!(text, "#ifdef {since}\n{assertion}\n#endif").unwrap(),
            None => writeln!(text, "{assertion}").unwrap(),
        }
    };
    for (name, value) in description::constants() {
        hold(name, format!("(unsigned long long)({name}) == {value}ULL"));
    }
    for (name, (fields, bytes)) in description::structures() {
        // The head of every request has a name of its own in the description.
        let linux = if name == "vfio_mig_any_feature" { "vfio_device_feature" } else { name };
        hold(name, format!("sizeof(struct {linux}) == {bytes}"));
        for (field, at) in fields {
            hold(name, format!("offsetof(struct {linux}, {field}) == {at}"));
        }
    }
    text
}

/// Whether a C compiler takes a program; else what it said.
fn compile(text: &str) -> Result<(), String> {
    let file = std::env::temp_dir().join("description.c");
    std::fs::write(&file, text).unwrap();
    let compiled = Command::new("gcc").args(["-std=gnu11", "-fsyntax-only"]).arg(&file).output().unwrap();
    match compiled.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&compiled.stderr).into_owned()),
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn the_description_is_that_of_the_kernels_headers() {
    let tree = std::env::var_os("LIMOSA_LAB_TREE").expect("lab/run says where the kernel's headers are");
    let header = Path::new(&tree).join("include/uapi/linux/vfio.h");
    let text = program(&header);
    compile(&text).unwrap_or_else(|said| panic!("{}: {said}", header.display()));
    // It can fail: another number of an ioctl, a field elsewhere.
    for (from, to) in [
        ("(VFIO_DEVICE_FEATURE) == ", "(VFIO_DEVICE_FEATURE) == 1"),
        (", initial_bytes) == ", ", initial_bytes) == 1"),
    ] {
        let wrong = text.replacen(from, to, 1);
        assert_ne!(wrong, text);
        assert!(compile(&wrong).is_err_and(|said| said.contains("static assertion failed")), "{to}");
    }
}
