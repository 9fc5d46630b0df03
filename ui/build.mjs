// Builds the page: `npm ci && npm run build` in this directory writes minisrv/server/ui/. Each file
// begins with the digest of all sources, by which a test without node sees whether it is current
// (tests/server/test_ui_files.py computes it in the same way).
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const out = join(here, "..", "minisrv", "server", "ui");

const names = ["package.json", "build.mjs", ...readdirSync(join(here, "src")).map((n) => `src/${n}`)];
const hash = createHash("sha256");
for (const name of names.sort()) {
  hash.update(`${name}\0`);
  hash.update(readFileSync(join(here, name)));
  hash.update("\0");
}
const mark = `sources sha256 ${hash.digest("hex")}`;

const result = await build({
  entryPoints: [join(here, "src", "app.ts"), join(here, "src", "app.css")],
  outdir: out,
  bundle: true,
  minify: true,
  charset: "utf8",
  target: ["es2022", "chrome115", "firefox115", "safari16.4"],
  legalComments: "none",
  write: false,
});
mkdirSync(out, { recursive: true });
for (const file of result.outputFiles) {
  writeFileSync(file.path, `/* ${mark} */\n${file.text}`);
}
const html = readFileSync(join(here, "src", "index.html"), "utf8");
writeFileSync(join(out, "index.html"), `<!-- ${mark} -->\n${html}`);
