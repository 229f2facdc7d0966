// Asks Prisma's own schema engines, and lets them change databases: a line of JSON in is a question, a line out its answer.
//   {"engine": "7.10.0", "url": "postgresql://…", "files": [{"path": …, "content": …}], "method": "schemaPush", "params": {…}}
//   → {"answer": {…}} or {"error": "…"}
// `files` is the Prisma schema; methods and params are those of SchemaEngine in node_modules/engine-7.10.0/schema_engine_bg.d.ts.
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'
import { PrismaPg } from '@prisma/adapter-pg'
import { bindMigrationAwareSqlAdapterFactory } from '@prisma/driver-adapter-utils'
import { parseIntoClientConfig } from 'pg-connection-string'

const THROWAWAY = /^close_engine_test_\w+$/

// The engines read types of the catalog that the adapter does not know: "char" is a character to them, name a text.
const CHAR = 18
const NAME = 19
const TEXT = 25
const CHARACTER = 6

class Adapters extends PrismaPg {
  constructor(config) {
    super(config)
    this.database = config
    this.open = []
  }

  async connect() {
    const adapter = understanding(await super.connect())
    this.open.push(adapter)
    return adapter
  }

  // The adapter's own drops the shadow database while it is still connected to it, which PostgreSQL refuses.
  async connectToShadowDb() {
    const here = await this.connect()
    const database = `${this.database.database}_shadow`
    await here.executeScript(`CREATE DATABASE "${database}"`)
    const shadow = await new Adapters({ ...this.database, database }).connect()
    const disconnect = shadow.dispose.bind(shadow)
    shadow.dispose = async () => {
      await disconnect()
      await here.executeScript(`DROP DATABASE "${database}"`)
    }
    this.open.push(shadow)
    return shadow
  }

  async close() {
    for (const adapter of this.open.splice(0).reverse()) await adapter.dispose().catch(() => {}) // the engine may have
  }
}

function understanding(adapter) {
  const query = adapter.client.query.bind(adapter.client)
  const queryRaw = adapter.queryRaw.bind(adapter)
  let types = []
  adapter.client.query = async (...given) => {
    const result = await query(...given)
    const fields = result?.fields ?? []
    types = fields.map((field) => field.dataTypeID)
    for (const field of fields) if (field.dataTypeID === CHAR || field.dataTypeID === NAME) field.dataTypeID = TEXT
    return result
  }
  adapter.queryRaw = async (asked) => {
    const result = await queryRaw(asked)
    result.columnTypes = result.columnTypes.map((type, column) => (types[column] === CHAR ? CHARACTER : type))
    return result
  }
  // The adapter's own cuts a script at every semicolon, even within a function's body. Prisma's command line does not.
  adapter.executeScript = async (script) => {
    await adapter.client.query(script).catch((error) => adapter.onError(error))
  }
  return adapter
}

globalThis.PRISMA_WASM_PANIC_REGISTRY = { set_message: (text) => console.error('Prisma’s engine panicked:', text) }

const engines = {}

async function engine(version) {
  if (!engines[version]) {
    const bg = await import(`engine-${version}/schema_engine_bg`)
    const path = createRequire(import.meta.url).resolve(`engine-${version}/schema_engine_bg`).replace(/\.js$/, '.wasm')
    const module = await WebAssembly.compile(readFileSync(path))
    const { exports } = await WebAssembly.instantiate(module, { './schema_engine_bg.js': bg })
    bg.__wbg_set_wasm(exports)
    exports.__wbindgen_start()
    engines[version] = bg.SchemaEngine
  }
  return engines[version]
}

async function ask({ engine: version, url, files, method, params }) {
  const config = parseIntoClientConfig(url)
  if (!THROWAWAY.test(config.database)) {
    throw new Error(`${url} is not a test's database: its name must begin with close_engine_test_.`)
  }
  const adapters = new Adapters({ ...config, statement_timeout: 60_000 })
  const datamodels = files.map(({ path, content }) => [path, content])
  const asked = await (await engine(version)).new({ datamodels }, () => {}, bindMigrationAwareSqlAdapterFactory(adapters))
  try {
    return await asked[method](params)
  } finally {
    await adapters.close()
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  let answer
  try {
    answer = { answer: (await ask(JSON.parse(line))) ?? null }
  } catch (error) {
    answer = { error: error?.message ?? String(error) }
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`)
}
process.exit() // the engines keep a timer
