"""Prisma itself finds nothing to change, whoever came first, and what it pushes leaves everything of ours alone.

Three versions of its schema engine judge (`tests/judge.py`), by the models as docs/prisma.md shows them. What they said
is the table in docs/prisma.md; `make matrix` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import peewee
import psycopg2
import pytest

import close_engine
from close_engine import (
    ActionStatus,
    ActionType,
    CloseEngineConversation,
    EntryPoint,
    Lead,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    Stage,
    User,
    outbox,
    submit,
)
from close_engine.cli import main
from close_engine.testing import bring_to
from tests.crm import AFTER, BEFORE, UNSEEN, catalog, query, restore
from tests.judge import ENGINES, IN_SYNC, PLACE, Migration, Prisma, Refused, judges, what_is_missing, with_models
from tests.prose import PRISMA, block, section
from tests.servers import execute, postgres_database

ALONE = (PLACE / "before.prisma").read_text()
SNIPPET = block(PRISMA, "prisma", "model CloseEngineConversation")
MODELS = with_models(ALONE, SNIPPET)
NOTHING = ALONE.partition("enum UserRole")[0]

#: The rows of the table in docs/prisma.md.
MIGRATED_FIRST = "`close-engine migrate`, then `db push`"
PUSHED_FIRST = "`db push`, then `close-engine migrate`"
WORKED_ON = "after conversations, drafts and approvals"
UNMAPPED = "tables without `@@map`, in both orders"
NAMED = "`rep` as a named relation, without `onDelete`"
PARTIAL_INDEXES = "with the preview feature `partialIndexes`"
PULLED = "`db pull`"
MARKED = "`migrate dev`, after `migrate resolve --applied`"
RESET = "`db push --force-reset`, then `close-engine migrate`"
SCRIPTED = "`migrate reset`, with our script as a migration"
LEFT_OUT = "the models left out of the schema"
TAKEN_BACK = "`close-engine downgrade`, then the schema without the models"
SITUATIONS = (
    *(MIGRATED_FIRST, PUSHED_FIRST, WORKED_ON, UNMAPPED, NAMED, PARTIAL_INDEXES, PULLED, MARKED, RESET, SCRIPTED),
    *(TAKEN_BACK, LEFT_OUT),
)

Recorded = Callable[[str, str], None]


@pytest.fixture(scope="session")
def versions(request: pytest.FixtureRequest) -> Iterator[dict[str, Prisma]]:
    """The versions of Prisma. Without Node they are left out, unless the run insists (`--prisma`)."""
    missing = what_is_missing()
    if missing and not request.config.getoption("--prisma"):
        pytest.skip(missing)
    with judges() as found:
        yield found


@pytest.fixture(params=ENGINES)
def prisma(request: pytest.FixtureRequest, versions: dict[str, Prisma]) -> Prisma:
    return versions[request.param]


@pytest.fixture
def empty_crm(server: str) -> Iterator[str]:
    """A database without tables."""
    with postgres_database(server) as url:
        yield url


@pytest.fixture
def crm(empty_crm: str) -> str:
    """The CRM's database, as Prisma made and filled it."""
    restore(empty_crm, BEFORE)
    return empty_crm


@contextmanager
def connected(url: str, **tables: Any) -> Iterator[peewee.Database]:
    database = close_engine.connect(url, **tables)
    try:
        yield database
    finally:
        database.close()


def shown() -> dict[str, list[str]]:
    """Return the table in docs/prisma.md: what stands in the row of each situation."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", section(PRISMA, "What was judged"), re.MULTILINE)
    return {situation: cells.split(" | ") for situation, cells in rows[1:]}


judged: dict[tuple[str, str], str] = {}


@pytest.fixture
def recorded(prisma: Prisma, request: pytest.FixtureRequest) -> Recorded:
    """Compare what was judged with the table in docs/prisma.md, or write it there."""

    def check(situation: str, verdict: str) -> None:
        if request.config.getoption("--write-matrix"):
            judged[situation, prisma.version] = verdict
            rows = [[name, *(judged.get((name, engine), "?") for engine in ENGINES)] for name in SITUATIONS]
            table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
            page = PRISMA.read_text()
            PRISMA.write_text(re.sub(r"(?<=\n\|---\|---\|---\|---\|\n)(\|.*\n)*", lambda _: table, page))
        cells = shown().get(situation, [])
        assert dict(zip(ENGINES, cells, strict=False)).get(prisma.version) == verdict, (
            "docs/prisma.md differs: run `make matrix`"
        )

    return check


def test_prisma_finds_nothing_to_change_after_us(prisma: Prisma, crm: str, recorded: Recorded) -> None:
    with connected(crm):
        close_engine.migrate()
        ours = catalog(crm, UNSEEN)
        assert ours["triggers"]

        found = prisma.judge(crm, MODELS)

        assert found == IN_SYNC
        assert close_engine.verify() == []
        assert catalog(crm, UNSEEN) == ours
        recorded(MIGRATED_FIRST, found)

        work(crm)

        found = prisma.judge(crm, MODELS)
        assert found == IN_SYNC
        assert close_engine.verify() == []
        assert catalog(crm, UNSEEN) == ours
        recorded(WORKED_ON, found)

        close_engine.schema.downgrade("0001_conversations")

        found = prisma.judge(crm, ALONE)
        assert found == IN_SYNC
        recorded(TAKEN_BACK, found)


def test_what_prisma_pushed_is_adopted_and_stays(prisma: Prisma, crm: str, server: str, recorded: Recorded) -> None:
    with postgres_database(server) as other:
        restore(other, AFTER)
        after = catalog(other)

    pushed = prisma.push(crm, MODELS)

    assert pushed.steps > 0
    assert pushed[1:] == ([], [])
    assert catalog(crm) == after
    with connected(crm):
        close_engine.migrate()
        found = prisma.judge(crm, MODELS)
        assert found == IN_SYNC
        assert close_engine.verify() == []
        work(crm)
        assert prisma.judge(crm, MODELS) == IN_SYNC
        assert close_engine.verify() == []
        recorded(PUSHED_FIRST, found)
        conversations = query(crm, "SELECT * FROM close_engine_conversations ORDER BY id")

        close_engine.schema.downgrade("0001_conversations")

    assert prisma.judge(crm, MODELS) == IN_SYNC
    assert catalog(crm) == after
    assert query(crm, "SELECT * FROM close_engine_conversations ORDER BY id") == conversations != []


def test_tables_may_be_named_like_their_models(prisma: Prisma, empty_crm: str, server: str, recorded: Recorded) -> None:
    alone = re.sub(r'^  @@map\("(leads|users|clients)"\)\n', "", ALONE, flags=re.MULTILINE)
    models = with_models(alone, SNIPPET)
    names = {"leads": "Lead", "users": "User", "clients": "Client"}
    verdicts = set()
    prisma.push(empty_crm, alone)
    add_people(empty_crm)
    with connected(empty_crm, **names):
        close_engine.migrate()
        verdicts.add(prisma.judge(empty_crm, models))
        assert close_engine.verify() == []
        work(empty_crm)
        verdicts.add(prisma.judge(empty_crm, models))
        assert close_engine.verify() == []
        close_engine.schema.downgrade("0001_conversations")
        verdicts.add(prisma.judge(empty_crm, alone))

    with postgres_database(server) as url:
        prisma.push(url, models)
        add_people(url)
        with connected(url, **names):
            close_engine.migrate()
            verdicts.add(prisma.judge(url, models))
            assert close_engine.verify() == []

    assert verdicts == {IN_SYNC}
    recorded(UNMAPPED, *verdicts)


def test_the_relation_to_the_rep_may_have_a_name_and_no_on_delete(prisma: Prisma, crm: str, recorded: Recorded) -> None:
    named = MODELS
    for plain, written in {
        "@relation(fields: [repId], references: [id], onDelete: SetNull)": (
            '@relation("CloseEngineRep", fields: [repId], references: [id])'
        ),
        "closeEngineConversations CloseEngineConversation[]": (
            'closeEngineConversations CloseEngineConversation[] @relation("CloseEngineRep")'
        ),
    }.items():
        assert named.count(plain) == 1
        named = named.replace(plain, written)

    with connected(crm):
        close_engine.migrate()
        found = prisma.judge(crm, named)
        assert close_engine.verify() == []

    assert found == IN_SYNC
    recorded(NAMED, found)


def with_partial_indexes(schema: str) -> str:
    return schema.replace("generator client {\n", 'generator client {\n  previewFeatures = ["partialIndexes"]\n')


def test_nothing_of_ours_is_a_partial_index(prisma: Prisma, crm: str, recorded: Recorded) -> None:
    with connected(crm):
        close_engine.migrate()
        if prisma.version.startswith("6."):
            with pytest.raises(Refused, match='The preview feature "partialIndexes" is not known'):
                prisma.judge(crm, with_partial_indexes(MODELS))
            recorded(PARTIAL_INDEXES, "knows no such feature")
            return

        found = prisma.judge(crm, with_partial_indexes(MODELS))

        assert found == IN_SYNC
        assert close_engine.verify() == []
        recorded(PARTIAL_INDEXES, found)


def test_e2_no_push_finds_an_index_of_ours_to_drop(prisma: Prisma, crm: str) -> None:
    """E2: some versions of Prisma drop partial indexes without a word; none of ours is on its tables."""
    drops_them = [MODELS] * (prisma.version == "7.4.2") + [with_partial_indexes(MODELS)] * (prisma.version[0] == "7")
    with connected(crm):
        close_engine.migrate()
        work(crm)
        before = catalog(crm), catalog(crm, UNSEEN)

        for schema in (MODELS, *drops_them):
            assert prisma.push(crm, schema, accept_data_loss=True) == (0, [], [])

        assert (catalog(crm), catalog(crm, UNSEEN)) == before
        assert close_engine.verify() == []
    for schema in drops_them:  # that they do drop them is what makes this a case
        execute(crm, "CREATE INDEX somebodys ON pending_actions (created_at) WHERE status = 'PENDING'")
        assert prisma.judge(crm, schema) == "drops 1 index"
        execute(crm, "DROP INDEX IF EXISTS somebodys")


def test_a_pull_shows_what_prisma_declared_and_warns_of_nothing(
    prisma: Prisma, crm: str, server: str, recorded: Recorded
) -> None:
    with connected(crm):
        close_engine.migrate()
        work(crm)
    with postgres_database(server) as other:
        restore(other, AFTER)
        for schema in (MODELS, NOTHING):
            assert prisma.pull(crm, schema) == prisma.pull(other, schema)

    pulled = prisma.pull(crm, NOTHING)

    assert pulled.warnings is None
    tables = re.findall(r"^model (\w+)", pulled.schema, re.MULTILINE)
    assert sorted(tables) == sorted(re.findall(r'@@map\("(\w+)"\)', MODELS))
    recorded(PULLED, "shows the models")


def test_without_the_models_prisma_wants_to_drop_what_we_added(prisma: Prisma, crm: str, recorded: Recorded) -> None:
    with connected(crm):
        close_engine.migrate()

        found = prisma.judge(crm, ALONE)

        assert found == "drops 2 constraints, 2 tables, 4 columns"
        recorded(LEFT_OUT, found)
        refused = prisma.push(crm, ALONE)
        assert refused.steps == 0  # there are leads, so it asks first
        assert len(refused.warnings) == 2
        assert close_engine.verify() == []
        assert prisma.push(crm, ALONE, accept_data_loss=True).steps == 6
        assert close_engine.verify() != []


def test_a_migration_of_prismas_is_marked_as_applied(prisma: Prisma, empty_crm: str, recorded: Recorded) -> None:
    first = Migration("0_crm", prisma.script(empty_crm, NOTHING, ALONE))
    second = Migration("1_close_engine_models", prisma.script(empty_crm, ALONE, MODELS))
    assert prisma.deploy(empty_crm, ALONE, first) == ["0_crm"]
    with connected(empty_crm):
        close_engine.migrate()
        assert prisma.dev(empty_crm, MODELS, first, second).startswith("Drift detected")
        with pytest.raises(Refused, match='column "autonomy_level" of relation "leads" already exists'):
            prisma.deploy(empty_crm, MODELS, first, second)

        prisma.resolve(empty_crm, MODELS, second.name, first, second)

        assert prisma.dev(empty_crm, MODELS, first, second) == ""
        assert prisma.deploy(empty_crm, MODELS, first, second) == []
        assert prisma.judge(empty_crm, MODELS) == IN_SYNC
        assert close_engine.verify() == []
        recorded(MARKED, "wants no reset")


def test_after_a_reset_we_make_it_whole(prisma: Prisma, crm: str, recorded: Recorded) -> None:
    with connected(crm):
        close_engine.migrate()
        work(crm)
        ours = catalog(crm, UNSEEN)

        prisma.reset(crm, MODELS)
        prisma.push(crm, MODELS)

        assert {schema for (schema,) in query(crm, "SELECT nspname FROM pg_namespace")} >= {"public", "close_engine"}
        assert catalog(crm, UNSEEN)["triggers"] == {}
        assert close_engine.migrate() != []
        found = prisma.judge(crm, MODELS)
        assert found == IN_SYNC
        assert close_engine.verify() == []
        assert catalog(crm, UNSEEN) == ours
        recorded(RESET, found)


def test_our_script_is_a_migration_of_prismas(
    prisma: Prisma, empty_crm: str, server: str, recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Migration("0_crm", prisma.script(empty_crm, NOTHING, ALONE))
    models = Migration("1_close_engine_models", prisma.script(empty_crm, ALONE, MODELS))
    prisma.deploy(empty_crm, MODELS, first, models)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--database", empty_crm, "migrate", "--sql", "--all"])
    ours = Migration("2_close_engine", capsys.readouterr().out)
    migrations = first, models, ours

    assert prisma.deploy(empty_crm, MODELS, *migrations) == ["2_close_engine"]
    with connected(empty_crm):
        assert close_engine.migrate() == []
        assert close_engine.verify() == []
        assert prisma.dev(empty_crm, MODELS, *migrations) == ""  # its shadow database has run them all

        prisma.reset(empty_crm, MODELS)

        assert prisma.deploy(empty_crm, MODELS, *migrations) == [migration.name for migration in migrations]
        assert close_engine.migrate() == []
        found = prisma.judge(empty_crm, MODELS)
        assert found == IN_SYNC
        assert close_engine.verify() == []
        recorded(SCRIPTED, found)

    with postgres_database(server) as url:  # where we came first
        prisma.deploy(url, ALONE, first)
        add_people(url, "leads", "users")
        with connected(url):
            close_engine.migrate()
            work(url)
            before = catalog(url), catalog(url, UNSEEN), query(url, "SELECT * FROM close_engine.history ORDER BY id")
            prisma.resolve(url, MODELS, models.name, *migrations)
            assert prisma.deploy(url, MODELS, *migrations) == ["2_close_engine"]
            after = catalog(url), catalog(url, UNSEEN), query(url, "SELECT * FROM close_engine.history ORDER BY id")
            assert after[1:] == before[1:]
            assert close_engine.verify() == []
            assert prisma.judge(url, MODELS) == IN_SYNC


def test_our_schema_in_the_list_of_schemas_costs_every_table_in_it(prisma: Prisma, crm: str) -> None:
    listed = re.sub(r"^(model|enum) .*?(?=^\})", r'\g<0>  @@schema("public")\n', MODELS, flags=re.MULTILINE | re.DOTALL)
    listed = listed.replace("datasource db {\n", 'datasource db {\n  schemas = ["public", "close_engine"]\n')
    tables = "SELECT relname FROM pg_class WHERE relnamespace = 'close_engine'::regnamespace AND relkind = 'r'"
    with connected(crm):
        close_engine.migrate()
        work(crm)
        count = len(query(crm, tables))

        assert prisma.judge(crm, listed) == f"drops {count} tables"
        assert any("drop the `history` table, which is not empty" in text for text in prisma.push(crm, listed).warnings)
        assert close_engine.verify() == []  # nothing happened yet

        assert prisma.push(crm, listed, accept_data_loss=True).steps == count
        assert query(crm, tables) == []
        for statement in (
            "UPDATE close_engine_conversations SET stage = 'CLOSED_LOST' WHERE stage = 'BUILDING'",
            "DELETE FROM leads WHERE id IN (SELECT lead_id FROM close_engine_conversations)",
        ):
            with pytest.raises(psycopg2.errors.UndefinedTable, match=r'relation "close_engine\.\w+" does not exist'):
                query(crm, statement)
        close_engine.migrate()
        assert close_engine.verify() == []
        assert prisma.judge(crm, MODELS) == IN_SYNC


def test_only_a_tests_database_is_judged(prisma: Prisma, server: str) -> None:
    with pytest.raises(Refused, match="is not a test's database"):
        prisma.push(server, MODELS)


def test_the_table_has_every_situation_and_version() -> None:
    assert tuple(shown()) == SITUATIONS
    assert all(len(cells) == len(ENGINES) and "?" not in cells for cells in shown().values())
    assert f"| Prisma | {' | '.join(ENGINES)} |\n" in section(PRISMA, "What was judged")


def add_people(url: str, leads: str = "Lead", users: str = "User") -> None:
    """Add a rep and a few leads."""
    query(
        url,
        f"""
        INSERT INTO "{users}" (id, email, name, updated_at) VALUES ('rep', 'dana@example.com', 'Dana', now());
        INSERT INTO "{leads}" (id, first_name, company_name, phone, updated_at)
            SELECT 'lead ' || n, 'Ana', 'Bakery', '+1555' || n, now() FROM generate_series(101, 122) n
        """,
    )


def work(url: str) -> None:
    """Bring conversations to every stage, decide on drafts from both sides, send, and sweep."""
    rep = User.select().first()
    leads = Lead.select().where(Lead.phone != "").order_by(Lead.id).limit(2 * len(Stage))
    for lead, stage in zip(leads, cycle(Stage)):
        bring_to(close_engine.open_conversation(lead, EntryPoint.SMS_REPLY, rep=rep), stage)
    assert set(query(url, "SELECT stage FROM close_engine_conversations")) == {(stage,) for stage in Stage}
    for conversation in CloseEngineConversation.in_stages(Stage.EDIT_LOOP, Stage.BUILDING):
        submit(conversation, ActionType.SEND_MESSAGE, "Here it is.", policy=lambda *_: True)
    ours, theirs, refused, _waiting = PendingAction.select().order_by(PendingAction.id)
    ours.approve(by="dana")
    refused.reject(by="dana")
    query(url, "UPDATE pending_actions SET status = 'APPROVED', approved_by = 'eve' WHERE id = %s", (theirs.id,))
    for message in outbox.claim(10):
        message.sent(f"SM{message.id}")
    query(url, "UPDATE close_engine_conversations SET stage = 'STALLED' WHERE stage = 'QUALIFYING'")
    close_engine.sweep()
    assert OutboxMessage.select().where(OutboxMessage.status == MessageStatus.SENT).count() == 2
    assert PendingAction.select().where(PendingAction.status == ActionStatus.APPROVED).count() == 2
