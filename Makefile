# Everything below installs what it needs into .venv first, and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo agency test check format lint types coverage storm soak cluster cluster-is-possible dialogues judge writer matrix browser screenshots docs wheel bench clean

demo: $(INSTALLED)
	@$(BIN)/close-engine demo

# Twenty leads against a whole agency: no account is needed, the providers are stand-ins on this machine.
agency: $(INSTALLED)
	@cd examples/agency && ../../$(BIN)/python -m play

# Without Node, this leaves out the tests in which Prisma is the judge, without `make writer` those in which it writes, and
# without Chromium those in which a browser visits the console. It says so. The check leaves out nothing.
test: $(INSTALLED)
	@$(BIN)/python -m tests.judge try
	$(BIN)/pytest -q -n 2

check: lint types coverage docs wheel

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy --strict close_engine
	$(BIN)/mypy --strict tests
	MYPYPATH=examples/agency $(BIN)/mypy --strict examples/agency/agency.py examples/agency/play

coverage: judge writer browser
	$(BIN)/pytest -q -n 2 --prisma --browser --cov --cov-report=term --cov-fail-under=95

# The chaos test at its full size: the check runs it with a tenth. It prints what happened.
storm: $(INSTALLED)
	$(BIN)/pytest -q -rP --storm tests/test_chaos.py

# Failover: servers, workers and clients on hosts of their own, on this machine. It needs Debian and root, and installs
# what it needs. `make cluster CHANGES=1000000` goes on until so many changes are acknowledged. Then Celery, on two brokers.
cluster: cluster-is-possible $(INSTALLED)
	@$(BIN)/python -m tests.cluster $(if $(CHANGES),--changes $(CHANGES))
	@$(BIN)/python -m tests.cluster.queues

cluster-is-possible:
	@$(PYTHON) -m tests.debian "make cluster"

# An agency works for days of simulated time, is hurt, and must end as it began. It needs neither root nor a package of
# the system. One minute is a smoke run; from five on, it judges whether anything grows.
MINUTES ?= 30
soak: $(INSTALLED)
	@$(BIN)/python -m tests.soak --minutes $(MINUTES)

# The dialogues of tests/dialogues with Claude itself, which ANTHROPIC_API_KEY pays for.
dialogues: $(INSTALLED)
	@$(BIN)/python -m tests.dialogue

# Prisma's engines, for the machine's Node or else for the one from PyPI.
judge: $(INSTALLED)
	@$(BIN)/python -m tests.judge node || \
		$(BIN)/pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[judge]'
	@$(BIN)/python -m tests.judge install

# Prisma's clients, generated from the models in docs/prisma.md: half a gigabyte, so only the check installs them.
writer: judge
	@$(BIN)/python -m tests.writer

# What Prisma judges, as the table in docs/prisma.md.
matrix: judge
	$(BIN)/pytest -q --prisma --write-matrix tests/test_judge.py

# Playwright and axe from PyPI, and Debian's Chromium unless there is one.
browser: $(INSTALLED)
	@$(BIN)/python -c "import axe_playwright_python, playwright" 2>/dev/null || \
		$(BIN)/pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[browser]'
	@$(BIN)/python -m tests.browser install

# The pictures in docs/console.md.
screenshots: browser
	$(BIN)/pytest -q --browser --screenshots tests/test_browser.py -k screenshots

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The wheel as a stranger gets it: a fresh environment, outside the checkout.
wheel: $(INSTALLED)
	rm -rf build dist
	$(BIN)/python -m build --quiet --wheel
	sh tests/try_wheel.sh "$(PYTHON)" dist/*.whl

bench: $(VENV)/.bench-installed
	$(BIN)/python -m bench

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(INSTALLED)

# What is measured beside it; nothing else needs that.
$(VENV)/.bench-installed: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	touch $(VENV)/.bench-installed

clean:
	rm -rf $(VENV) build dist site tests/prisma/node_modules *.egg-info .coverage* .mypy_cache .ruff_cache .hypothesis
	cd tests/prisma/clients && rm -rf node_modules */node_modules */generated */schema.prisma
