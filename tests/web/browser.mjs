// EventSource and WebSocket of a real browser, from a page of another origin: node browser.mjs NODE_URL
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { chromium } from 'playwright-core';
import { run, say, until } from './script.mjs';

const FLAGS = [
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
];

// Runs in the page.
function watch(url) {
  const state = { one: [], many: [], opens: 0, errors: 0, socket: [] };
  window.state = state;
  const one = new EventSource(`${url}/sse?channel=news`);
  one.onopen = () => { state.opens += 1; };
  one.onerror = () => { state.errors += 1; };
  one.onmessage = (event) => { state.one.push({ data: event.data, id: event.lastEventId }); };
  one.addEventListener('gap', (event) => { state.one.push({ data: `gap ${event.data}`, id: event.lastEventId }); });
  const many = new EventSource(`${url}/sse?channel=a&channel=b`);
  many.onopen = () => { state.opens += 1; };
  for (const name of ['a', 'b', 'gap']) {
    many.addEventListener(name, (event) => { state.many.push(`${name} ${event.data}`); });
  }
  const socket = new WebSocket(`${url.replace('http', 'ws')}/connection/websocket`);
  socket.onopen = () => { socket.send('{"id":1,"connect":{}}'); };
  socket.onmessage = (event) => { state.socket.push(event.data); };
}

run(async ([url]) => {
  const server = createServer((request, response) => {
    response.setHeader('Content-Type', 'text/html');
    response.end('<!doctype html><title>watching</title>');
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const profile = await mkdtemp(join(tmpdir(), 'weir-browser-'));
  const browser = await chromium.launchPersistentContext(profile, {
    executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
    headless: true,
    chromiumSandbox: false,
    args: FLAGS,
  });
  try {
    const page = await browser.newPage();
    await page.goto(`http://127.0.0.1:${server.address().port}/`);
    await page.evaluate(watch, url);
    const state = () => page.evaluate(() => window.state);
    const reached = (one, many) => until(async () => {
      const now = await state();
      return now.one.length >= one && now.many.length >= many && now;
    });

    await until(async () => {
      const now = await state();
      return now.opens >= 2 && now.socket.length >= 1;
    });
    say('open', await state());
    say('received', await reached(10, 10));
    // The test ends the node, publishes past it, and starts it again; twice, in two ways.
    say('resumed', await reached(20, 20));
    say('done', await reached(30, 30));
  } finally {
    await browser.close();
    await rm(profile, { recursive: true, force: true });
    server.close();
  }
});
