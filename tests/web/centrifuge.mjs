// The published centrifuge client, unmodified, against a node: node centrifuge.mjs WEBSOCKET_URL
import { Centrifuge } from 'centrifuge';
import WebSocket from 'ws';
import { run, say, toldToGoOn, until } from './script.mjs';

run(async ([url]) => {
  const client = new Centrifuge(url, { websocket: WebSocket, minReconnectDelay: 50, maxReconnectDelay: 500 });
  const faults = [];
  client.on('error', (context) => faults.push(context));

  const seen = [];
  const subscribed = [];
  const subscription = client.newSubscription('numbers');
  subscription.on('publication', (context) => seen.push({ data: context.data, offset: context.offset }));
  subscription.on('subscribed', (context) =>
    subscribed.push({ recoverable: context.recoverable, wasRecovering: context.wasRecovering, recovered: context.recovered }));
  subscription.subscribe();
  client.connect();
  await subscription.ready();
  say('subscribed', { subscribed });

  await until(() => seen.length >= 100);
  say('received', { seen });

  let published = null;
  try {
    await subscription.publish({ from: 'client' });
  } catch (error) {
    published = error.code;
  }
  say('published', { refused: published });

  const history = await subscription.history({ limit: 3, reverse: true });
  say('history', { offsets: history.publications.map((publication) => publication.offset), top: history.offset });

  // The test ends the node here, publishes past it, and starts it again.
  const before = seen.length;
  await until(() => subscribed.length >= 2 && seen.length >= before + 10);
  say('recovered', { subscribed, seen: seen.slice(before) });

  subscription.unsubscribe();
  say('unsubscribed');
  await toldToGoOn();
  // A second subscription that the test publishes to afterwards shows that nothing of the first one came.
  const other = client.newSubscription('other');
  const otherSeen = [];
  other.on('publication', (context) => otherSeen.push(context.data));
  other.subscribe();
  await other.ready();
  const afterUnsubscribe = seen.length;
  say('other');
  await until(() => otherSeen.length >= 1);
  say('done', { otherSeen, extra: seen.length - afterUnsubscribe, seen: seen.length });
  client.disconnect();
});
