#!lua name=weir
-- weir publishing contract, version 2
--
-- One atomic step for every publishing language: take the channel's next offset, append to its stream, publish with
-- the position. A node loads this file as a function library when it connects; by hand:
--
--   redis-cli -x FUNCTION LOAD REPLACE < publish.lua
--   redis-cli FCALL weir_publish 2 'weir:{news}:meta' 'weir:{news}:stream' 'weir:{news}' '{"hello":1}'
--   1) "5f2c9a01"     epoch
--   2) (integer) 1    offset
--   3) (integer) 0    1 when this was a repetition: nothing was published, the position is the first one's
--
-- Where functions are missing (before Redis 7) the same text without its first line is a script: EVAL it, then EVALSHA,
-- with the same keys and arguments.
--
-- Names, for prefix `weir:` and channel C. The braces put all of a channel into one cluster slot.
--   weir:{C}:meta      hash: epoch, offset, t (the tag of the publication with that offset), was (the epochs before, see below)
--   weir:{C}:stream    stream: the history
--   weir:{C}:once:K    string: the position of the publication that had idempotency key K
--   weir:{C}           pub/sub channel
--
-- KEYS  meta, stream, and, for a publication with an idempotency key, the `once` key.
-- ARGV  pub/sub channel, payload (UTF-8), then options; an absent or empty one takes its default:
--   maxlen             publications the stream keeps, exactly; 0 keeps none        (1024)
--   ttl                seconds an idle stream is kept                              (300)
--   idempotency ttl    seconds a repetition is recognised                          (300)
--
-- Tag of a publication: when it was published, in microseconds since 1970. A server that lost its last writes gives their
-- offsets out again, and such an offset then stands for two publications. They have two tags, also when they have one payload:
-- a node that remembers the tag of the last publication it delivered can tell whether the server still has that one.
--
-- Message on the pub/sub channel: byte 0xFF, epoch, `.`, offset, `.`, tag, space, payload. No UTF-8 text contains 0xFF, so a
-- plain `PUBLISH 'weir:{news}' '{"hello":1}'` is told apart: it is delivered to whoever is connected, without a position.
--
-- Entry of the stream: id `<offset>-0`, so that a range of offsets is a range of ids; field `d`, the payload; `t`, its tag;
-- `p`, the tag of the publication before it (absent for the first), by which that one is recognised when its entry is gone.
-- A plain `XADD 'weir:{news}:stream' '*' d '{"hello":1}'` is possible: its id is a time, above every offset. It has no
-- position and is delivered to nobody until the next weir_publish on the channel, which takes such entries up first, in their
-- order: it gives them offsets and publishes them. Of more than maxlen such entries the oldest are lost.
--
-- meta outlives the stream on purpose (30 idle days against minutes): while it lives, a client that comes back late learns
-- exactly that publications are gone, or that none are. When it is lost a new epoch begins and every client is told.
-- A node that finds that writes were lost changes the epoch and leaves offset and stream as they are; `was` then gets the old
-- epoch: eight hexadecimal digits each, the latest last. An epoch that begins at offset 0 has no `was`.

local META_SECONDS = 2592000
-- Ids from here on are times (milliseconds, the year 2001 and later); offsets stay below.
local TIME_IDS = '1000000000000'

local function whole(text, default, least, most)
  if text == nil or text == '' then return default end
  local number = string.match(text, '^%d+$') and tonumber(text)
  if number and number >= least and number <= most then return number end
end

local function new_epoch(keys, args)
  local time = redis.call('TIME')
  local epoch = string.sub(redis.sha1hex(table.concat({time[1], time[2], keys[1], args[2]}, '\n')), 1, 8)
  -- Zero stands for "before any epoch" in clients' positions.
  return epoch == '00000000' and '00000001' or epoch
end

-- The payloads of entries that a plain XADD made, oldest first.
local function plain_entries(stream, maxlen)
  redis.call('XTRIM', stream, 'MAXLEN', '=', maxlen)
  local entries = redis.call('XRANGE', stream, TIME_IDS, '+')
  local ids, payloads = {}, {}
  for i, entry in ipairs(entries) do
    local fields = entry[2]
    ids[i], payloads[i] = entry[1], fields[2]
    for f = 1, #fields, 2 do
      if fields[f] == 'd' then payloads[i] = fields[f + 1] end
    end
  end
  return ids, payloads
end

local function weir_publish(keys, args)
  if #keys < 2 or #keys > 3 then
    return redis.error_reply('ERR weir_publish takes 2 keys (meta, stream) or 3 (and once)')
  end
  if #args < 2 or #args > 5 then
    return redis.error_reply(
      'ERR weir_publish takes 2 to 5 arguments: channel, payload, maxlen, ttl seconds, idempotency ttl seconds')
  end
  local meta, stream, once = keys[1], keys[2], keys[3]
  local channel, payload = args[1], args[2]
  local maxlen = whole(args[3], 1024, 0, 1000000)
  if not maxlen then return redis.error_reply('ERR maxlen is a whole number from 0 to 1000000') end
  local ttl = whole(args[4], 300, 1, META_SECONDS)
  if not ttl then return redis.error_reply('ERR ttl is a whole number of seconds from 1 to 2592000') end
  local once_ttl = whole(args[5], 300, 1, META_SECONDS)
  if not once_ttl then return redis.error_reply('ERR idempotency ttl is a whole number of seconds from 1 to 2592000') end

  if once then
    local epoch, offset = string.match(redis.call('GET', once) or '', '^(%x+)%.(%d+)$')
    if epoch then return {epoch, tonumber(offset), 1} end
  end

  local known = redis.call('HMGET', meta, 'epoch', 'offset', 't')
  local epoch, offset, before = known[1], tonumber(known[2] or '0'), known[3]
  local time = redis.call('TIME')
  local tag = string.format('%s%06d', time[1], time[2])
  local taken_up = {}
  if not epoch then
    epoch, offset, before = new_epoch(keys, args), 0, false
    local _
    _, taken_up = plain_entries(stream, maxlen)
    redis.call('DEL', stream)
  end

  local function append(data)
    offset = offset + 1
    local number = string.format('%d', offset)
    if maxlen > 0 then
      local id = number .. '-0'
      local added
      if before then
        added = redis.pcall('XADD', stream, 'MAXLEN', '=', maxlen, id, 'd', data, 't', tag, 'p', before)
      else
        added = redis.pcall('XADD', stream, 'MAXLEN', '=', maxlen, id, 'd', data, 't', tag)
      end
      if added.err then
        offset = offset - 1
        return added
      end
    end
    redis.call('HSET', meta, 'epoch', epoch, 'offset', number, 't', tag)
    redis.call('PUBLISH', channel, '\255' .. epoch .. '.' .. number .. '.' .. tag .. ' ' .. data)
    before = tag
  end

  for _, data in ipairs(taken_up) do append(data) end
  local failed = append(payload)
  if failed and string.find(failed.err, 'equal or smaller', 1, true) then
    -- The stream's last id is above the next offset: plain XADDs came in between, or meta and stream do not belong together.
    local ids
    ids, taken_up = plain_entries(stream, maxlen)
    if #ids > 0 then
      for _, id in ipairs(ids) do redis.call('XDEL', stream, id) end
      redis.call('XSETID', stream, string.format('%d-0', offset))
    else
      redis.call('DEL', stream, meta)
      epoch, offset, before = new_epoch(keys, args), 0, false
    end
    for _, data in ipairs(taken_up) do append(data) end
    failed = append(payload)
  end
  if failed then return failed end

  redis.call('EXPIRE', meta, META_SECONDS)
  if maxlen > 0 then redis.call('EXPIRE', stream, ttl) end
  if once then
    redis.call('SET', once, epoch .. '.' .. string.format('%d', offset), 'PX', once_ttl * 1000)
  end
  return {epoch, offset, 0}
end

if redis.register_function then
  redis.register_function('weir_publish', weir_publish)
else
  return weir_publish(KEYS, ARGV)
end
