// What the scripts here share. A script talks with the test that runs it line by line: it writes one JSON object a line,
// each with a `step`, the last one being `done`; the test may write a line to let it go on.
import { createInterface } from 'node:readline';
import { once } from 'node:events';

const lines = createInterface({ input: process.stdin });

export function say(step, facts = {}) {
  process.stdout.write(JSON.stringify({ step, ...facts }) + '\n');
}

export async function toldToGoOn() {
  await once(lines, 'line');
}

// Waits until `probe` gives something true, and returns it. The test that runs this script has the deadline.
export async function until(probe) {
  for (;;) {
    const value = await probe();
    if (value) return value;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

export async function run(main) {
  try {
    await main(process.argv.slice(2));
    process.exit(0);
  } catch (error) {
    process.stderr.write(`${error.stack ?? error}\n`);
    process.exit(1);
  }
}
