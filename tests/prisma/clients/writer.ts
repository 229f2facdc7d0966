// One version of Prisma Client, generated from the models in docs/prisma.md: a line of JSON in is code to run with it, a
// line out is what the code returned, or how it failed.
//   {"url": "postgresql://…", "code": "return prisma.lead.count()", "given": {"name": value}, "ahead": milliseconds}
//   → {"answer": …} or {"error": {"name": …, "code": …, "message": …, "sentence": …}}
// The code is the body of an async function. It knows `prisma`, `Prisma` and what is given, and what the TypeScript in
// docs/prisma.md exports, which stands in the file that the second argument names. Without code, all connections close.
import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'

const [version, page] = process.argv.slice(2)
const { PrismaPg } = createRequire(new URL(`./${version}/package.json`, import.meta.url))('@prisma/adapter-pg')
const { PrismaClient, Prisma } = await import(`./${version}/generated/client.ts`)
const documented = await import(page)

const clients = new Map<string, InstanceType<typeof PrismaClient>>()

function client(url: string) {
  if (!clients.has(url)) {
    const adapter = new PrismaPg({ connectionString: url, max: 10, statement_timeout: 60_000 })
    clients.set(url, new PrismaClient({ adapter, transactionOptions: { maxWait: 60_000, timeout: 60_000 } }))
  }
  return clients.get(url)
}

async function close() {
  for (const open of clients.values()) await open.$disconnect()
  clients.clear()
}

const RealDate = Date

function setClock(ahead: number) {
  globalThis.Date = !ahead
    ? RealDate
    : class extends RealDate {
        constructor(...given: any[]) {
          given.length ? super(...(given as [any])) : super(RealDate.now() + ahead)
        }
        static now() {
          return RealDate.now() + ahead
        }
      }
}

const AsyncFunction = (async () => {}).constructor as FunctionConstructor

async function run({ url, code, given = {}, ahead = 0 }: { url: string; code: string; given: object; ahead: number }) {
  const known = { prisma: client(url), Prisma, ...documented, ...given }
  setClock(ahead)
  try {
    return await new AsyncFunction(...Object.keys(known), code)(...Object.values(known))
  } finally {
    setClock(0)
  }
}

const plain = (_: string, value: unknown) => (typeof value === 'bigint' ? Number(value) : value)

for await (const line of createInterface({ input: process.stdin })) {
  const asked = JSON.parse(line)
  let answer
  try {
    answer = { answer: (asked.code ? await run(asked) : await close()) ?? null }
  } catch (e: any) {
    answer = { error: { name: e.name, code: e.code ?? null, message: e.message, sentence: documented.refusal(e) ?? '' } }
  }
  process.stdout.write(`${JSON.stringify(answer, plain)}\n`)
}
process.exit() // a test that failed may have left connections
