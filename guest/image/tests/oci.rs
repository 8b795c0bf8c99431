//! OCI layouts: layers on top of each other, what to run, digests.

mod common;

use std::fs;
use std::path::Path;

use common::{Bench, Entry, Tar, gzip, named, of_source, why, zstd};
use guest_image::Options;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// An OCI layout that is being written.
struct Layout<'a>(&'a Path);

impl<'a> Layout<'a> {
    fn new(root: &'a Path) -> Self {
        fs::create_dir_all(root.join("blobs/sha256")).expect("a folder");
        fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("a file");
        Self(root)
    }

    /// Writes a blob; gives its descriptor.
    fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digits: Vec<_> =
            Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let digits = digits.concat();
        fs::write(self.0.join("blobs/sha256").join(&digits), bytes).expect("a blob");
        let digest = format!("sha256:{digits}");
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }

    fn json(&self, kind: &str, value: &Value) -> Value {
        self.blob(
            &format!("application/vnd.oci.image.{kind}.v1+json"),
            value.to_string().as_bytes(),
        )
    }

    fn layer(&self, end: &str, bytes: &[u8]) -> Value {
        self.blob(&format!("application/vnd.oci.image.layer.v1.tar{end}"), bytes)
    }

    fn manifest(&self, config: &Value, layers: &[Value]) -> Value {
        let config = self.json("config", config);
        let value = json!({ "schemaVersion": 2, "config": config, "layers": layers });
        self.json("manifest", &value)
    }

    fn index(&self, manifests: &[Value]) {
        let value = json!({ "schemaVersion": 2, "manifests": manifests });
        fs::write(self.0.join("index.json"), value.to_string()).expect("a file");
    }
}

fn amd64(config: &Value) -> Value {
    json!({ "architecture": "amd64", "os": "linux", "config": config })
}

/// The image of these layers.
fn layered(layers: &[Tar]) -> Result<Vec<Entry>, String> {
    let bench = Bench::new();
    let root = bench.path("oci");
    let layout = Layout::new(&root);
    let bytes = layers.iter().map(|tar| tar.0.get_ref().clone());
    let layers: Vec<_> = bytes
        .map(|mut bytes| {
            bytes.extend([0; 1024]);
            layout.layer("+gzip", &gzip(&bytes))
        })
        .collect();
    layout.index(&[layout.manifest(&amd64(&json!({})), &layers)]);
    match bench.image(&root) {
        Ok((_, image)) => Ok(of_source(&image)),
        Err(error) => Err(why(&error)),
    }
}

fn names(entries: &[Entry]) -> Vec<&str> {
    entries.iter().map(|entry| &*entry.name).collect()
}

#[test]
fn layers_lie_on_top_of_each_other() {
    let lower = Tar::new()
        .directory("./")
        .directory("a/")
        .file("a/old", "1")
        .file("a/kept", "1")
        .file("b", "1")
        .directory("c/")
        .file("c/below", "1")
        .file("d/e/f", "1")
        .file("linked", "1")
        .symlink("lib", "usr/lib")
        .directory("usr/lib");
    let upper = Tar::new()
        .file("a/.wh.old", "")
        .file(".wh.b", "")
        .file("c/new", "2")
        .file("c/.wh..wh..opq", "")
        .file("c/.wh..wh.plnk", "")
        .file(".wh.d", "")
        .file("d/g", "2")
        .link("hard", "linked")
        .file(".wh.linked", "")
        .file("lib/through", "2")
        .file(".wh.nothing", "");
    let entries = layered(&[lower, upper]).expect("an image");
    assert_eq!(
        names(&entries),
        [
            ".",
            "a",
            "a/kept",
            "c",
            "c/new",
            "d",
            "d/g",
            "hard",
            "lib",
            "usr",
            "usr/lib",
            "usr/lib/through"
        ]
    );
    assert_eq!(named(&entries, "hard").bytes, b"1");
    assert_eq!(named(&entries, "hard").links, 1);
}

#[test]
fn a_layout_is_the_same_image_as_its_only_layer() {
    let bench = Bench::new();
    let tar = Tar::new().directory("d/").file("d/f", "1").link("h", "d/f").symlink("s", "d").done();
    let plain = bench.write("plain.tar", &tar);
    let (_, image) = bench.image(&plain).expect("of the archive");
    for (end, bytes) in [("", tar.clone()), ("+gzip", gzip(&tar)), ("+zstd", zstd(&tar))] {
        let root = bench.path(&format!("oci{end}"));
        let layout = Layout::new(&root);
        let config = amd64(&json!({}));
        layout.index(&[layout.manifest(&config, &[layout.layer(end, &bytes)])]);
        let (_, other) = bench.image(&root).expect("of the layout");
        // Only their numbers differ, because one has a configuration.
        let numbered = |image: &[u8]| {
            let mut entries = of_source(image);
            let first = named(&entries, "d").ino;
            entries.iter_mut().skip(1).for_each(|entry| entry.ino -= first);
            entries
        };
        assert_eq!(numbered(&image), numbered(&other), "{end}");
    }
}

#[test]
fn wrong_whiteouts_are_refused() {
    let said = layered(&[Tar::new().file("a", ""), Tar::new().file(".wh...", "")]);
    let said = said.expect_err("a refusal");
    assert!(said.ends_with("it is a whiteout that names nothing that could be removed"), "{said}");
    let said = layered(&[Tar::new().file("../.wh.a", "")]).expect_err("a refusal");
    assert!(said.ends_with("its path has `..`, which could lead out of the image"), "{said}");
    let said = layered(&[Tar::new().file(".uk/.wh..wh..opq", "").file(".uk/a", "")]);
    assert!(said.expect_err("a refusal").contains("`/.uk` is kept"));
}

#[test]
fn what_to_run_comes_from_the_image() {
    let bench = Bench::new();
    let root = bench.path("oci");
    let layout = Layout::new(&root);
    let execution = json!({
        "User": "1000:1000",
        "Env": ["PATH=/bin:/usr/bin", "A=b=c", "EMPTY"],
        "Entrypoint": ["/entry", "--flag"],
        "Cmd": ["serve"],
        "WorkingDir": "/srv",
    });
    layout.index(&[layout.manifest(&amd64(&execution), &[])]);
    let (built, image) = bench.image(&root).expect("an image");
    let config = built.config.expect("a configuration");
    assert_eq!(config.argv, ["/entry", "--flag", "serve"]);
    assert_eq!(config.cwd, "/srv");
    let env: Vec<_> = config.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    assert_eq!(env, ["A=b=c", "EMPTY=", "PATH=/bin:/usr/bin"]);
    assert_eq!(built.user.as_deref(), Some("1000:1000"));
    let (entries, _) = common::read(&image);
    let text = r#"{"argv":["/entry","--flag","serve"],"cwd":"/srv","env":{"A":"b=c","EMPTY":"","PATH":"/bin:/usr/bin"}}"#;
    assert_eq!(named(&entries, ".uk/config.json").bytes, text.as_bytes());

    let command = ["other".to_owned()];
    let options = Options { command: Some(&command), ..Options::default() };
    let (built, _) = bench.image_with(&root, &options).expect("an image");
    assert_eq!(built.config.expect("a configuration").argv, ["/entry", "--flag", "other"]);
}

#[test]
fn the_image_for_this_platform_is_chosen() {
    let bench = Bench::new();
    let root = bench.path("oci");
    let layout = Layout::new(&root);
    let on = |mut manifest: Value, os: &str, architecture: &str| {
        manifest["platform"] = json!({ "os": os, "architecture": architecture });
        manifest
    };
    let run = |what: &str| amd64(&json!({ "Cmd": [what] }));
    let ours = on(layout.manifest(&run("ours"), &[]), "linux", "amd64");
    let arm = on(layout.manifest(&run("arm"), &[]), "linux", "arm64");
    let proof = on(layout.manifest(&run("proof"), &[]), "unknown", "unknown");
    let below = json!({ "schemaVersion": 2, "manifests": [arm.clone(), ours.clone(), proof] });
    layout.index(&[layout.json("index", &below), ours.clone()]);
    let (built, _) = bench.image(&root).expect("an image");
    assert_eq!(built.config.expect("a configuration").argv, ["ours"]);

    let refusal = || why(&bench.image(&root).expect_err("a refusal"));
    layout.index(&[arm]);
    assert!(
        refusal().ends_with("oci/index.json: it has no image for linux/amd64"),
        "{}",
        refusal()
    );
    layout.index(&[ours, layout.manifest(&run("second"), &[])]);
    let said = refusal();
    assert!(
        said.ends_with("it has 2 images for linux/amd64; export the wanted one alone"),
        "{said}"
    );
    let other = json!({ "architecture": "riscv64", "os": "linux" });
    layout.index(&[layout.manifest(&other, &[])]);
    assert!(refusal().ends_with("the image is for linux/riscv64"), "{}", refusal());
}

#[test]
fn nothing_is_believed_without_its_digest() {
    let bench = Bench::new();
    let root = bench.path("oci");
    let layout = Layout::new(&root);
    let refusal = || why(&bench.image(&root).expect_err("a refusal"));
    let file = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().expect("a digest").replace("sha256:", "");
        root.join("blobs/sha256").join(digest)
    };
    let layer = layout.layer("", &Tar::new().file("a", "text").done());
    let manifest = layout.manifest(&amd64(&json!({})), std::slice::from_ref(&layer));
    layout.index(std::slice::from_ref(&manifest));
    bench.image(&root).expect("an image");

    let whole = fs::read(file(&layer)).expect("the layer");
    let mut other = whole.clone();
    other[513] ^= 1;
    fs::write(file(&layer), &other).expect("the layer");
    assert!(refusal().contains(" is damaged: its digest is sha256:"), "{}", refusal());
    fs::write(file(&layer), &whole[..600]).expect("the layer");
    assert!(refusal().contains(" is cut off"), "{}", refusal());
    fs::remove_file(file(&layer)).expect("the layer");
    assert!(refusal().starts_with("cannot look at "), "{}", refusal());
    fs::write(file(&manifest), b"{}").expect("the manifest");
    assert!(refusal().contains(" is damaged: its digest is sha256:"), "{}", refusal());
}

#[test]
fn a_layout_that_breaks_the_rules_is_refused() {
    let bench = Bench::new();
    let root = bench.path("oci");
    let layout = Layout::new(&root);
    let refusal = || why(&bench.image(&root).expect_err("a refusal"));
    for digest in ["sha256:../../../etc/passwd", "sha512:00", "", "sha256:AA"] {
        layout.index(&[json!({ "mediaType": "", "digest": digest, "size": 1 })]);
        let said = refusal();
        let end = format!("oci/index.json: `{digest}` is not a digest of the kind sha256");
        assert!(said.ends_with(&end), "{said}");
    }
    let layer = layout.blob("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", b"");
    layout.index(&[layout.manifest(&amd64(&json!({})), &[layer])]);
    assert!(refusal().ends_with("+gzip+encrypted, not tar"), "{}", refusal());
    fs::write(root.join("index.json"), "[").expect("a file");
    assert!(refusal().contains("oci/index.json: EOF while parsing"), "{}", refusal());
    fs::write(root.join("index.json"), "{}").expect("a file");
    fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).expect("a file");
    assert!(refusal().ends_with("oci-layout: version 2.0.0 is not known"), "{}", refusal());
    fs::write(root.join("oci-layout"), vec![b' '; 5 << 20]).expect("a file");
    assert!(refusal().ends_with("it is not a file of at most 4194304 bytes"), "{}", refusal());
}
