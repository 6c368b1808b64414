# Everything the project does, one target each. `make run` and `make test` install what they need.
SHELL := bash
CARGO ?= cargo
PREFIX ?= /usr/local
SEEDS ?= 2000
SCRIPT_LENGTH ?= 2
FUZZ_SECONDS ?= 30
# Where cargo puts what it builds.
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
KERNELS ?= 6.12 7.2
VERSION := $(shell sed -n '/^\[workspace.package\]/,/^version/s/^version = "\(.*\)"/\1/p' Cargo.toml)

.PHONY: run test ci sim mutations fuzz coverage bench lint fmt doc install lib tools-release programs programs-test

tools-release:
	$(CARGO) build --release -p tidegate-tools

# The C library: target/release/libtidegate.so and libtidegate.a.
lib:
	$(CARGO) build --release -p tidegate-ffi
	ffi/link $(TARGET)/release

# The programs over it, and their tests with a server; FIO_SOURCE=DIR for the fio engine.
programs: lib
	$(MAKE) -C ffi LIBRARY=$(TARGET)/release OUT=$(TARGET)/programs nbdkit examples
programs-test:
	ffi/tests/programs

# The main job, shown: on this kernel if it has ublk, else in the test machine.
run: tools-release
	TIDEGATE_BIN=$(TARGET)/release/tidegate tools/demo/run

# All tests, those on a real kernel included (in the test machine, on every kernel of KERNELS).
test:
	tests/run $(KERNELS)

ci: lint test

# Seeded crash simulation: SEEDS worlds and everything within bounds (scripts of up to SCRIPT_LENGTH requests), or the one world
# of SEED=…. See docs/testing.md.
sim:
	TIDEGATE_SEEDS=$(SEEDS) TIDEGATE_SEED=$(SEED) TIDEGATE_SCRIPT_LENGTH=$(SCRIPT_LENGTH) $(CARGO) test --release -p tidegate-tests --test crash -- --nocapture

# Deliberate bugs in the engine, one at a time: the simulator must find each.
mutations:
	$(CARGO) test --release -p tidegate-tests --features mutations --test mutations -- --nocapture

# Fuzzers for every decoder, FUZZ_SECONDS each; what they find that is new goes to target/fuzz.
fuzz:
	tests/fuzz/run $(FUZZ_SECONDS)

# Which lines of the engine the tests reach.
coverage:
	tests/coverage

# Everything side by side with its peers, into docs/benchmarks.md: two hours; ONLY=…, ROUNDS=… and more: see benches/run.
bench:
	benches/run

lint:
	$(CARGO) fmt --all --check
	$(CARGO) fmt --manifest-path tests/fuzz/Cargo.toml --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet

fmt:
	$(CARGO) fmt --all

doc:
	$(CARGO) doc --workspace --no-deps
	TIDEGATE_UPDATE_DOCS=1 $(CARGO) test -p tidegate-driver --test formats_doc
	TIDEGATE_UPDATE_HEADER=1 $(CARGO) test -p tidegate-ffi --test header

install: tools-release lib
	install -D -m 0755 $(TARGET)/release/tidegate $(DESTDIR)$(PREFIX)/sbin/tidegate
	install -D -m 0644 tools/packaging/tidegate@.service $(DESTDIR)/usr/lib/systemd/system/tidegate@.service
	install -d $(DESTDIR)/usr/lib/udev/rules.d
	sed 's|/usr/local/sbin/tidegate|$(PREFIX)/sbin/tidegate|' tools/packaging/90-tidegate.rules \
		> $(DESTDIR)/usr/lib/udev/rules.d/90-tidegate.rules
	chmod 0644 $(DESTDIR)/usr/lib/udev/rules.d/90-tidegate.rules
	install -D -m 0644 tools/packaging/tidegate.conf $(DESTDIR)/usr/lib/modules-load.d/tidegate.conf
	install -d $(DESTDIR)/usr/share/bash-completion/completions
	$(TARGET)/release/tidegate completion bash > $(DESTDIR)/usr/share/bash-completion/completions/tidegate
	install -d $(DESTDIR)$(PREFIX)/lib/pkgconfig
	install -m 0644 $(TARGET)/release/libtidegate.a $(DESTDIR)$(PREFIX)/lib/
	install -m 0755 $(TARGET)/release/libtidegate.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib/
	ln -sf libtidegate.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib/libtidegate.so.0
	ln -sf libtidegate.so.0 $(DESTDIR)$(PREFIX)/lib/libtidegate.so
	install -D -m 0644 ffi/include/tidegate.h $(DESTDIR)$(PREFIX)/include/tidegate.h
	sed 's|@PREFIX@|$(PREFIX)|; s|@VERSION@|$(VERSION)|' ffi/tidegate.pc.in > $(DESTDIR)$(PREFIX)/lib/pkgconfig/tidegate.pc
	chmod 0644 $(DESTDIR)$(PREFIX)/lib/pkgconfig/tidegate.pc
	install -D -m 0644 ffi/man/libtidegate.3 $(DESTDIR)$(PREFIX)/share/man/man3/tidegate.3
	@# On this machine, and not into a package: have what runs read what is new.
	if [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
	if [ -z "$(DESTDIR)" ] && command -v ldconfig > /dev/null; then ldconfig; fi
	if [ -z "$(DESTDIR)" ] && command -v udevadm > /dev/null; then udevadm control --reload || true; fi
