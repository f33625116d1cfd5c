"""What must happen in Redis in one piece, as Lua.

Redis has no single command for "start the lease anew if the job is still mine", and between a question and the command
that follows it another worker may have acted.
"""

from __future__ import annotations

from typing import Final

__all__ = ["CLAIM_STALE", "LEAVE", "RENEW", "RETRY", "SETTLE", "TRIM"]

#: Take over the oldest job that has been idle for ARGV[3] ms and is none of ARGV[4], ARGV[5], ...: {id, fields,
#: deliveries}. Entries that somebody deleted from the stream while they were being worked on are taken off the list.
CLAIM_STALE: Final = """
local aside = {}
for i = 4, #ARGV do aside[ARGV[i]] = true end
local from, rows = '-', nil
repeat
  rows = redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[3], from, '+', 64)
  for _, row in ipairs(rows) do
    if not aside[row[1]] then
      local entry = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], row[1])[1]
      if entry and entry[2] then return {entry[1], entry[2], row[4] + 1} end
      redis.call('XACK', KEYS[1], ARGV[1], row[1])
    end
    from = '(' .. row[1]
  end
until #rows < 64
return false
"""

#: Reset the idle time of job ARGV[3] if consumer ARGV[2] has it: 1, else 0.
RENEW: Final = """
local row = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)[1]
if not row or row[2] ~= ARGV[2] then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'JUSTID')
return 1
"""

#: Make it look idle for ARGV[4] ms, delivered ARGV[5] times, if consumer ARGV[2] has it: so CLAIM_STALE finds it.
RETRY: Final = """
local row = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)[1]
if not row or row[2] ~= ARGV[2] then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'IDLE', ARGV[4], 'RETRYCOUNT', ARGV[5], 'JUSTID')
return 1
"""

#: Acknowledge job ARGV[2], whoever has it, and write what came of it to KEYS[2] (at most about ARGV[3] entries; fields
#: and values follow). The first to do so is the only one: 1, else 0.
SETTLE: Final = """
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', unpack(ARGV, 4))
return 1
"""

#: Remove finished jobs from a stream that has grown beyond ARGV[2] entries; what is unfinished stays, however much.
TRIM: Final = """
if redis.call('XLEN', KEYS[1]) <= tonumber(ARGV[2]) then return 0 end
local oldest = redis.call('XPENDING', KEYS[1], ARGV[1])[2]
if not oldest then
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local facts = {}
    for i = 1, #group, 2 do facts[group[i]] = group[i + 1] end
    if facts['name'] == ARGV[1] then oldest = facts['last-delivered-id'] end
  end
end
if not oldest then return 0 end
return redis.call('XTRIM', KEYS[1], 'MINID', '~', oldest)
"""

#: Remove consumer ARGV[2], and others not seen for ARGV[3] ms, from the group. One that has jobs stays: they would go
#: with it.
LEAVE: Final = """
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local facts = {}
  for i = 1, #consumer, 2 do facts[consumer[i]] = consumer[i + 1] end
  local gone = facts['name'] == ARGV[2] or facts['idle'] > tonumber(ARGV[3])
  if gone and facts['pending'] == 0 then redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], facts['name']) end
end
return 1
"""
