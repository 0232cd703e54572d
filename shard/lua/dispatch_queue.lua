-- The dispatch queue: a capped cache of the best ready jobs of every requirement class. A hint, never the truth:
-- it may be lost, flushed, stale or full of rubbish at any time.
--
-- Keys, P being the prefix `culm:<shard>:`
--   P generation        string   made at the first use; missing means that everything here is gone
--   P floors            hash     field <slot>:<class> -> rank of the worst job that is surely here: what ranks below it
--                                stays in InnoDB. No field: everything of that class is here.
--   P topping           hash     field <slot>:<class> -> 1 while a top-up reads what comes next in InnoDB: every push is
--                                kept then, below the floor too, where the set is not whole and nothing is taken.
--   P ready:<slot>:<class>  sorted set   member <id>, 16 digits; score <ranking>: minus the priority
--
-- A floor is written "<ranking>:<id>". ARGV[1] is always the generation that the caller knows; where it is not the
-- stored one nothing is done and {-1, <stored or ''>} is the answer.
--
-- The first line of each function's body is its name: the caller sends the part that it needs after the common head.

-- name: common
local prefix, known = KEYS[1], ARGV[1]
local stored = redis.pcall('GET', prefix .. 'generation')
-- Rubbish, of another type too, is no generation.
if type(stored) ~= 'string' or not string.match(stored, '^%x+$') then stored = '' end
local function ready(class) return prefix .. 'ready:' .. class end
local function ahead(score, id, floor_score, floor_id)
    return score < floor_score or (score == floor_score and id <= floor_id)
end
local function floor_of(class)
    local floor = redis.call('HGET', prefix .. 'floors', class)
    if not floor then return nil end
    local score, id = string.match(floor, '^(-?%d+):(%d+)$')
    return tonumber(score), id
end
local function set_floor(class, score, id)
    redis.call('HSET', prefix .. 'floors', class, string.format('%d:%s', score, id))
end
-- What is above the floor is whole: the worst of it beyond `cap` may go, and the floor rises.
local function trim(class, cap)
    local over = redis.call('ZCARD', ready(class)) - cap
    if over > 0 then
        redis.call('ZREMRANGEBYRANK', ready(class), -over, -1)
        local worst = redis.call('ZRANGE', ready(class), -1, -1, 'WITHSCORES')
        set_floor(class, tonumber(worst[2]), worst[1])
    end
end
-- What ranks below the floor goes: the range there is not known to be whole.
local function cut_below(class, score, id)
    redis.call('ZREMRANGEBYSCORE', ready(class), '(' .. score, '+inf')
    while true do
        local worst = redis.call('ZRANGE', ready(class), -1, -1, 'WITHSCORES')
        if #worst == 0 or tonumber(worst[2]) < score or worst[1] <= id then break end
        redis.call('ZREM', ready(class), worst[1])
    end
end

-- name: begin
-- ARGV[2]: a new generation. Answers the one that holds now. Who knows none (a start, a failure) takes nothing over:
-- hints that were left of classes that nobody refills any more would stay for ever.
if stored ~= '' and stored == known then return stored end
for _, name in ipairs(redis.call('KEYS', prefix .. '*')) do redis.call('DEL', name) end
redis.call('SET', prefix .. 'generation', ARGV[2])
return ARGV[2]

-- name: push
-- ARGV[2]: cap; then triples class, ranking, id. What ranks below a class's floor is left to InnoDB.
if stored == '' or stored ~= known then return {-1, stored} end
local cap, touched = tonumber(ARGV[2]), {}
for i = 3, #ARGV, 3 do
    local class, score, id = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2]
    local floor_score, floor_id = floor_of(class)
    local topping = redis.call('HEXISTS', prefix .. 'topping', class) == 1
    if topping or not floor_score or ahead(score, id, floor_score, floor_id) then
        redis.call('ZADD', ready(class), score, id)
        touched[class] = not topping
    end
end
for class, whole in pairs(touched) do
    if whole then trim(class, cap) end
end
return {0}

-- name: take
-- ARGV[2]: how few are low; then per group: how many wanted, how many classes, the classes. Answers {0, per group: a
-- list of class, ranking, id triples in the order of dispatch}, and last the classes that ran low while a floor holds.
if stored == '' or stored ~= known then return {-1, stored} end
local answer, low, few, i = {0}, {}, tonumber(ARGV[2]), 3
while i <= #ARGV do
    local wanted, n_classes = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
    local taken, heads, cut = {}, {}, nil
    for c = 1, n_classes do
        local class = ARGV[i + 1 + c]
        heads[c] = { class = class, list = redis.call('ZRANGE', ready(class), 0, wanted - 1, 'WITHSCORES'), at = 1 }
        local score, id = floor_of(class)
        local topping = score and redis.call('HEXISTS', prefix .. 'topping', class) == 1
        if score and (topping or #heads[c].list < wanted * 2) and (not cut or not ahead(cut.score, cut.id, score, id)) then
            cut = { score = score, id = id }
        end
    end
    for _ = 1, wanted do
        local best
        for _, head in ipairs(heads) do
            local id, score = head.list[head.at], tonumber(head.list[head.at + 1])
            if id and (not best or score < best.score or (score == best.score and id < best.id)) then
                best = { head = head, id = id, score = score }
            end
        end
        if not best then break end
        -- A class that ran dry above its floor: InnoDB may hold better ones of it than what is left here.
        if cut and not ahead(best.score, best.id, cut.score, cut.id) then break end
        best.head.at = best.head.at + 2
        taken[#taken + 1] = best.head.class
        taken[#taken + 1] = string.format('%d', best.score)
        taken[#taken + 1] = best.id
    end
    for _, head in ipairs(heads) do
        local n_taken = (head.at - 1) / 2
        if n_taken > 0 then redis.call('ZREMRANGEBYRANK', ready(head.class), 0, n_taken - 1) end
        -- With a floor the set must never run dry unnoticed: more waits in InnoDB.
        if redis.call('ZCARD', ready(head.class)) < math.max(wanted * 4, few) and floor_of(head.class) then
            low[#low + 1] = head.class
        end
    end
    answer[#answer + 1] = taken
    i = i + 2 + n_classes
end
answer[#answer + 1] = low
return answer

-- name: open_refill
-- ARGV[2]: class. It is emptied, of stale hints too, and until close_refill everything pushed is kept: that may rank
-- above what the refill is about to read. Nothing is taken from it meanwhile.
if stored == '' or stored ~= known then return {-1, stored} end
for _, name in ipairs({'floors', 'topping'}) do
    if redis.call('TYPE', prefix .. name).ok ~= 'hash' then redis.call('DEL', prefix .. name) end
    redis.call('HDEL', prefix .. name, ARGV[2])
end
redis.call('DEL', ready(ARGV[2]))
return {0}

-- name: close_refill
-- ARGV[2]: class, ARGV[3]: 1 if InnoDB holds more than what follows; then pairs ranking, id: its best, read after
-- open_refill. Members that rank below the last of these go, for the range between is not known to be whole.
if stored == '' or stored ~= known then return {-1, stored} end
local class, more = ARGV[2], ARGV[3] == '1'
for i = 4, #ARGV, 2 do redis.call('ZADD', ready(class), tonumber(ARGV[i]), ARGV[i + 1]) end
-- A push since open_refill may have passed the cap and left a floor: what it cut off is not in the list either.
local score, id = floor_of(class)
if more then
    local last_score, last_id = tonumber(ARGV[#ARGV - 1]), ARGV[#ARGV]
    if not score or ahead(last_score, last_id, score, id) then score, id = last_score, last_id end
end
if score then
    cut_below(class, score, id)
    set_floor(class, score, id)
end
return {0}

-- name: open_top_up
-- ARGV[2]: class. Answers {0, ranking, id} of its floor: what InnoDB holds below it may be read now, for from here on
-- every push is kept. {0} where there is no floor.
if stored == '' or stored ~= known then return {-1, stored} end
local score, id = floor_of(ARGV[2])
if not score then return {0} end
redis.call('HSET', prefix .. 'topping', ARGV[2], 1)
return {0, string.format('%d', score), id}

-- name: close_top_up
-- ARGV[2]: class, ARGV[3]: cap, ARGV[4]: 1 if InnoDB holds more than what follows, ARGV[5], ARGV[6]: the floor that
-- open_top_up gave; then pairs ranking, id: the next ones below it. Answers {1} where the floor is another one by now.
if stored == '' or stored ~= known then return {-1, stored} end
local class, cap, more = ARGV[2], tonumber(ARGV[3]), ARGV[4] == '1'
redis.call('HDEL', prefix .. 'topping', class)
local score, id = floor_of(class)
if not score then return {0} end
if score ~= tonumber(ARGV[5]) or id ~= ARGV[6] then
    cut_below(class, score, id)
    return {1}
end
for i = 7, #ARGV, 2 do redis.call('ZADD', ready(class), tonumber(ARGV[i]), ARGV[i + 1]) end
if more then
    score, id = tonumber(ARGV[#ARGV - 1]), ARGV[#ARGV]
    cut_below(class, score, id)
    set_floor(class, score, id)
else
    redis.call('HDEL', prefix .. 'floors', class)
end
trim(class, cap)
return {0}

-- name: remove
-- ARGV: then pairs class, id: taken by way of InnoDB, their hints are stale.
if stored == '' or stored ~= known then return {-1, stored} end
for i = 2, #ARGV, 2 do redis.call('ZREM', ready(ARGV[i]), ARGV[i + 1]) end
return {0}
